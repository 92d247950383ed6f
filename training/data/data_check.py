"""Check conversation data before any training: every row read, every picture decoded, every answer encoded."""

import hashlib
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from assistant.images import DEFAULT_LIMITS
from assistant.tiles import Size, size_of
from training.data.conversations import Conversation, Fault, Kind, PictureReference, RowError
from training.data.decoding import decode, too_many
from training.data.lesson_judge import LessonJudge
from training.data.picture_references import PictureFinder
from training.data.pictures import DataError
from training.data.recognise import ConversationRows

DAMAGED = 0.01  # share of the rows that training skips; a recipe's `damaged` where unset
AHEAD = 256  # rows whose pictures are opened while the rows before them are judged


@dataclass(frozen=True)
class Finding:
    """A fault and the row that has it."""

    row: int  # from 1
    place: str
    fault: Fault


@dataclass
class Check:
    """What was found in one source."""

    name: str
    form: str
    kind: str
    rows: int
    longest: int
    conversations: int = 0  # that can be read as such
    good: list[int] = field(default_factory=list)  # rows, from 1, that are taught
    turns: int = 0
    pictures: int = 0  # places of pictures; one picture may have many
    many_pictures: int = 0  # conversations with several
    text_only: int = 0
    dialogues: int = 0  # conversations with several turns
    systems: int = 0
    lengths: list[int] = field(default_factory=list)  # tokens of each taught row
    supervised: int = 0  # tokens that are learned, of all taught rows
    endless: int = 0  # taught rows whose last learned token ends no turn
    moved: int = 0  # taught rows whose template takes a picture before words that stand before it
    findings: list[Finding] = field(default_factory=list)
    pictures_of: dict[str, tuple[int, str]] = field(default_factory=dict)  # content hash -> first row with it, place
    sizes: dict[int, tuple[Size | None, ...]] = field(default_factory=dict)  # of the pictures of taught rows with some

    @property
    def refused(self) -> int:
        """Rows that are not taught."""
        return self.rows - len(self.good)

    def by_kind(self) -> dict[Kind, list[Finding]]:
        """The findings of each kind; what refuses rows comes first, then the most frequent."""
        counts = Counter(finding.fault.kind for finding in self.findings)
        order = sorted(counts, key=lambda kind: (not _refuses(kind, self.findings), -counts[kind], kind))
        return {kind: [finding for finding in self.findings if finding.fault.kind == kind] for kind in order}

    def stops(self, strict: bool, damaged: float = DAMAGED) -> bool:
        """Whether training would stop: too many rows are refused, one of them where `strict`, or none is left."""
        return not self.good or too_many(0 if strict else damaged, self.refused, self.rows)


def _refuses(kind: Kind, findings: list[Finding]) -> bool:
    return next(finding.fault.refuses for finding in findings if finding.fault.kind == kind)


@dataclass(frozen=True)
class Looked:
    """What became of one picture: the hash of its bytes and its size, or what is wrong with it."""

    content_hash: str | None = None
    fault: Fault | None = None
    size: Size | None = None


def check_data(
    rows: ConversationRows,
    finder: PictureFinder,
    judge: LessonJudge,
    advance: Callable[[int], None] = lambda done: None,
) -> Check:
    """Look at every row of `rows`; `advance` is told of each that is done.

    A row is refused for what training refuses it for. Pictures are decoded to their last byte, as training decodes
    them, in threads, and each only once.
    """
    check = Check(rows.name, rows.form, rows.records.kind, len(rows), judge.longest)
    seen: dict[str, int] = {}
    for row, conversation, looked in _rows_with_pictures(rows, finder, judge.view_side, check):
        _judge_row(check, rows, judge, row, conversation, looked, seen)
        advance(row)
    advance(len(rows))
    check.findings.sort(key=lambda finding: finding.row)
    return check


def _rows_with_pictures(
    rows: ConversationRows, finder: PictureFinder, side: int | None, check: Check
) -> Iterator[tuple[int, Conversation, list[Looked]]]:
    """Each readable row, from 1, with what became of its pictures; the others become findings."""
    waiting: deque[tuple[int, Conversation, list[Future[Looked]]]] = deque()
    with _threads() as pool:
        futures: dict[str, Future[Looked]] = {}

        def look(reference: PictureReference) -> Future[Looked]:
            key = finder.key(reference)
            if key not in futures:
                futures[key] = pool.submit(look_at, finder, reference, side)
            return futures[key]

        for index in range(len(rows)):
            try:
                conversation = rows[index]
            except RowError as error:
                check.findings.append(Finding(index + 1, rows.place(index), error.fault))
                continue
            waiting.append((index + 1, conversation, [look(reference) for reference in conversation.pictures]))
            if len(waiting) > AHEAD:
                row, ready, looked = waiting.popleft()
                yield row, ready, [future.result() for future in looked]
        for row, ready, looked in waiting:
            yield row, ready, [future.result() for future in looked]


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    try:
        yield pool
    finally:
        # Ctrl-C does not wait for pictures that nobody wants any more.
        pool.shutdown(cancel_futures=True)


def look_at(finder: PictureFinder, reference: PictureReference, side: int | None) -> Looked:
    """Decode a picture as training does, for views of `side` pixels, or whole where it is cut into tiles."""
    try:
        content = finder.content(reference)
        if not isinstance(content, bytes):
            with content.open("rb") as file:
                content = file.read(DEFAULT_LIMITS.max_bytes + 1)
        size = size_of(decode(content, str(reference), side))
    except RowError as error:
        return Looked(fault=error.fault)
    except (DataError, OSError) as error:
        return Looked(
            fault=Fault("damaged picture", reference.field, str(error).rstrip("."), "mend it, or take it out")
        )
    return Looked(hashlib.sha256(content).hexdigest(), size=size)


def _judge_row(
    check: Check,
    rows: ConversationRows,
    judge: LessonJudge,
    row: int,
    conversation: Conversation,
    looked: list[Looked],
    seen: dict[str, int],
) -> None:
    place = rows.place(row - 1)
    check.conversations += 1
    check.turns += conversation.turns
    check.pictures += len(looked)
    faults = [
        # A picture is looked at once; each row that shows it has its own field for it.
        replace(each.fault, field=reference.field)
        for reference, each in zip(conversation.pictures, looked, strict=True)
        if each.fault is not None
    ]
    try:
        encoded = judge.encode(conversation, [each.size for each in looked])
        faults += judge.remarks(conversation)
    except RowError as error:
        faults.append(error.fault)
    hashes = [each.content_hash for each in looked if each.content_hash]
    if not any(fault.refuses for fault in faults):
        key = _key(conversation, hashes)
        if key in seen:
            wrong = f"the same pictures and words as row {seen[key]}"
            faults.append(Fault("duplicate", "row", wrong, "take one out, unless it should count twice"))
        seen.setdefault(key, row)
        check.good.append(row)
        if looked:
            check.sizes[row] = tuple(each.size for each in looked)
        check.lengths.append(len(encoded.ids))
        check.supervised += sum(encoded.supervised)
        check.endless += not judge.learns_to_stop(encoded)
        check.moved += judge.moves_pictures(conversation)
        check.text_only += not looked
        check.many_pictures += len(looked) > 1
        check.dialogues += conversation.turns > 1
        check.systems += conversation.messages[0].role == "system"
        for content_hash in hashes:
            check.pictures_of.setdefault(content_hash, (row, place))
    check.findings += [Finding(row, place, fault) for fault in faults]


def _key(conversation: Conversation, hashes: list[str]) -> str:
    """The same for rows with the same pictures at the same places and the same words."""
    named = iter(hashes)
    said = [
        (message.role, [part.strip() if isinstance(part, str) else next(named) for part in message.parts])
        for message in conversation.messages
    ]
    return hashlib.sha256(repr(said).encode()).hexdigest()


def shared_pictures(trained: Check, held_out: Check) -> list[Finding]:
    """A finding for each picture that is in both, with the row of `held_out` that shows it first."""
    return [
        Finding(
            row,
            place,
            Fault(
                "in both files",
                "row",
                f"its picture is also in {trained.pictures_of[content_hash][1]} of {trained.name}",
                "take it out of one file: a score on pictures that were trained on says little",
            ),
        )
        for content_hash, (row, place) in sorted(held_out.pictures_of.items(), key=lambda pair: pair[1])
        if content_hash in trained.pictures_of
    ]


def histogram(check: Check, bins: int = 12) -> list[tuple[int, int, int]]:
    """How many taught rows have from so many to so many tokens (the upper end is not in it)."""
    if not check.lengths:
        return []
    low, high = min(check.lengths), max(check.lengths) + 1
    width = max(1, -(-(high - low) // bins))
    edges = list(range(low, high + width, width))
    counts, _ = np.histogram(check.lengths, edges)
    return [(start, start + width, int(count)) for start, count in zip(edges, counts, strict=False)]


def spread(rows: list[int], count: int) -> list[int]:
    """Up to `count` of `rows`, evenly from the first to the last."""
    return [rows[int(place)] for place in np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round())]
