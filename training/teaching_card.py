"""The card of a taught model: what it was made from, how to use it, and what it answers before and after."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

CARD = "README.md"
OTHER_CARD = "README.kangaroo.md"  # ours, where a person's own stands in its place
SIGNATURE = re.compile(r"<!-- written by kangaroo; edit it and it stays as you leave it; sha256 ([0-9a-f]{64}) -->\n")
FRONT = "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n---\n"
LONGEST_CELL = 300  # characters
COLUMNS = ("what", "questions", "before", "after", "change")


@dataclass(frozen=True)
class Share:
    """A share of answers from 0 to 1, and its 95 % interval (Wilson)."""

    share: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.share:.1%} ({self.low:.1%} to {self.high:.1%})"


@dataclass(frozen=True)
class Change:
    """One line of the table; both are None where nothing could be asked."""

    what: str
    questions: int
    before: Share | None
    after: Share | None

    def cells(self) -> tuple[str, ...]:
        """The line in words."""
        if self.before is None or self.after is None:
            return self.what, "0", "not known", "not known", ""
        points = 100 * (self.after.share - self.before.share)
        return self.what, str(self.questions), str(self.before), str(self.after), f"{points:+.1f} points"


@dataclass(frozen=True)
class Sample:
    """A held-out question, what is right, and what was answered."""

    question: str
    right: str
    before: str
    after: str


@dataclass(frozen=True)
class Made:
    """What the model was made from: names and settings in words, and sha256 of the data."""

    name: str
    base: str
    how: tuple[tuple[str, str], ...]
    data: tuple[tuple[str, str], ...]
    adapter: bool


@dataclass(frozen=True)
class TeachingReport:
    """Everything that is told of a model that was taught."""

    made: Made
    new: Change  # the held-out rows
    loss_before: float | None
    loss_after: float | None
    known: Change  # generated scenes
    kinds: tuple[Change, ...]  # the same, by kind of question
    hallucination: Change  # share of yes to what is not in the scene
    samples: tuple[Sample, ...]
    remarks: tuple[str, ...]  # what is worth knowing before believing the numbers
    warnings: tuple[str, ...]  # what got worse, and the way out

    def rows(self, kinds: bool) -> list[tuple[str, ...]]:
        """The table; with `kinds` what it knew is also told by kind of question."""
        loss = ("loss on these rows, lower is better", str(self.new.questions), "not known", "not known", "")
        if self.loss_before is not None and self.loss_after is not None:
            change = f"{self.loss_after - self.loss_before:+.3f}"
            loss = (*loss[:2], f"{self.loss_before:.3f}", f"{self.loss_after:.3f}", change)
        told = [change.cells() for change in self.kinds] if kinds else []
        return [self.new.cells(), loss, self.known.cells(), *told, self.hallucination.cells()]


def report_table(report: TeachingReport) -> Table:
    """Before and after, for the terminal."""
    table = Table(*COLUMNS, title="Before and after")
    for row in report.rows(kinds=False):
        table.add_row(*row)
    return table


def card_of(report: TeachingReport, curves: str | None) -> str:
    """The card as Markdown, signed, so that it can be told from one that a person wrote. `curves` is a picture."""
    made = report.made
    body = [
        "",
        f"# {made.name}",
        "",
        f"{made.base}, taught with Kangaroo.",
        "",
        "## What it was made from",
        "",
        *_table(("what", ""), [("base", made.base), *made.how]),
        "",
        *_table(("data", "sha256"), made.data),
        "",
        "`provenance.json` beside this card holds the whole recipe and the versions.",
        "",
        "## How to use it",
        "",
        *_usage(made),
        "",
        "## Before and after",
        "",
        *_table(COLUMNS, report.rows(kinds=True)),
        "",
        "In brackets: the 95 % interval (Wilson). `report.json` holds the numbers.",
        "",
        *(f"- {remark}" for remark in report.remarks),
        *(f"- **{warning}**" for warning in report.warnings),
        "",
        *([f"![Loss and scores over the steps]({curves})", ""] if curves else []),
        *_samples(report),
    ]
    return signed(FRONT, "\n".join(body).rstrip() + "\n")


def _usage(made: Made) -> list[str]:
    lines = ["```sh", "kangaroo chat THIS_FOLDER", "kangaroo ask PICTURE QUESTION --model THIS_FOLDER", "```", ""]
    lines.append("It is in the layout of transformers: `AutoModelForImageTextToText.from_pretrained(THIS_FOLDER)`.")
    if made.adapter:
        lines.append("The folder `adapter` holds what was trained alone, for peft and vLLM, on the base named above.")
    return lines


def _samples(report: TeachingReport) -> list[str]:
    if not report.samples:
        return []
    rows = [(sample.question, sample.before, sample.after, sample.right) for sample in report.samples]
    heading = f"## The first {len(rows)} held-out questions, unchosen"
    return [heading, "", *_table(("question", "before", "after", "right"), rows), ""]


def _table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return lines + ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]


def _cell(text: str) -> str:
    """One line that no Markdown or HTML in it can break."""
    short = " ".join(text.split())
    short = short if len(short) <= LONGEST_CELL else short[: LONGEST_CELL - 3] + "..."
    return short.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def signed(front: str, body: str) -> str:
    """`front` and `body` with a line between them that knows their hash."""
    digest = hashlib.sha256((front + body).encode()).hexdigest()
    line = SIGNATURE.pattern.replace("([0-9a-f]{64})", digest)
    return front + line.replace("\\n", "\n") + body


def is_ours(card: str) -> bool:
    """Whether `card` is exactly as it was written here; one that a person changed is theirs."""
    found = SIGNATURE.search(card)
    if found is None:
        return False
    rest = card[: found.start()] + card[found.end() :]
    return hashlib.sha256(rest.encode()).hexdigest() == found[1]


@contextmanager
def kept_card(folder: Path) -> Iterator[None]:
    """Put the card of a person back into `folder`, which is written anew meanwhile."""
    file = folder / CARD
    content = file.read_bytes() if file.is_file() else None
    try:
        yield
    finally:
        if content is not None and not is_ours(content.decode(errors="replace")):
            folder.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)


def write_card(folder: Path, card: str) -> Path:
    """Write `card` into `folder`, beside the one of a person where there is one, and say where."""
    file = folder / CARD
    if file.is_file() and not is_ours(file.read_text(errors="replace")):
        file = folder / OTHER_CARD
    file.write_text(card)
    return file
