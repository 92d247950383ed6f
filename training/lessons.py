"""What a lesson is, and how lessons become the rows of tokens that a model reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from assistant.chat import IMAGE_TOKEN, EncodedConversation, assistant_message, encode_conversation, user_message
from assistant.tiles import Processor, token_counts
from training.segment_attention import Segment

LENGTH_MULTIPLE = 32  # tokens; each new length of a batch costs a CPU a fifth of a second of kernel preparation


@dataclass(frozen=True)
class Lesson:
    """Pictures, uint8 (3, side, side) each, and what is asked about them, answer by answer.

    For a model that cuts pictures into tiles they are uint8 (3, H, W), of any size, and are cut when they are collated.
    The turns are independent of each other (each sees the pictures only) unless `is_dialogue`. Pictures stand before
    the first question; where they stand elsewhere, or there is a system message, `messages` says it all and there are
    no turns: one conversation in the form of `assistant.chat`, whose k-th picture place is the k-th view.
    """

    name: str
    views: tuple[Tensor, ...]
    turns: tuple[tuple[str, str], ...]
    is_dialogue: bool = False
    messages: tuple[dict[str, Any], ...] = ()

    def conversations(self) -> list[list[dict[str, Any]]]:
        """The messages of each conversation that is taught; each has all pictures."""
        if self.messages:
            return [list(self.messages)]
        together = [self.turns] if self.is_dialogue else [(turn,) for turn in self.turns]
        return [self._asked(turns) for turns in together]

    def _asked(self, turns: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        messages = []
        for number, (question, answer) in enumerate(turns):
            messages += [user_message(question, len(self.views) if number == 0 else 0), assistant_message(answer)]
        return messages


@dataclass(frozen=True)
class PackedLesson:
    """T tokens of one lesson: a shared beginning, then its conversations side by side."""

    ids: Tensor  # (T,) int64
    supervised: Tensor  # (T,) bool
    weights: Tensor  # (T,) float32
    positions: Tensor  # (T,) int64
    branch: Tensor  # (T,) int64; 0 is the shared beginning


def pack(lesson: Lesson, processor: Processor, longest: int, length_power: float = 0.0) -> PackedLesson:
    """Encode the turns of `lesson` and lay them side by side after their shared beginning.

    Turns that would pass `longest` are left out, from the end; picture tokens are never cut.
    """
    counts = token_counts(processor, lesson.views)
    encoded = [encode_conversation(processor.tokenizer, messages, counts) for messages in lesson.conversations()]
    shared = _shared_length(encoded, processor) if len(encoded) > 1 else 0
    ids, supervised, weights = encoded[0].ids[:shared], [False] * shared, [0.0] * shared
    positions, branch = list(range(shared)), [0] * shared
    for number, conversation in enumerate(encoded, start=1):
        rest = len(conversation.ids) - shared
        if len(ids) + rest > longest and number > 1:
            break
        ids = ids + conversation.ids[shared:]
        supervised = supervised + conversation.supervised[shared:]
        weights = weights + [sum(conversation.supervised) ** -length_power] * rest
        positions += range(shared, shared + rest)
        branch += [number] * rest
    if len(ids) > longest:
        raise ValueError(f"lesson {lesson.name} has {len(ids)} tokens, more than {longest}; shorten its words")
    return PackedLesson(
        torch.tensor(ids),
        torch.tensor(supervised),
        torch.tensor(weights),
        torch.tensor(positions),
        torch.tensor(branch),
    )


def _shared_length(encoded: Sequence[EncodedConversation], processor: Processor) -> int:
    image_id = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    same = takewhile(lambda column: len(set(column)) == 1, zip(*(e.ids for e in encoded), strict=False))
    common = [column[0] for column in same]
    # Share up to the last picture token only: words that happen to agree are cheap and belong to their question.
    return len(common) - common[::-1].index(image_id) if image_id in common else 0


def in_rows(packed: Sequence[PackedLesson], pad: int) -> dict[str, Any]:
    """A row for each lesson, padded to one length."""
    length = max(len(p.ids) for p in packed)
    length += -length % LENGTH_MULTIPLE
    ids = torch.full((len(packed), length), pad)
    positions = torch.zeros_like(ids)
    attends = torch.eye(length, dtype=torch.bool).repeat(len(packed), 1, 1, 1)
    predicts = torch.zeros(ids.shape, dtype=torch.bool)
    for row, lesson in enumerate(packed):
        size = len(lesson.ids)
        ids[row, :size], positions[row, :size] = lesson.ids, lesson.positions
        attends[row, 0, :size, :size] = attention_of(lesson.branch)
        predicts[row, predictor_of(lesson)] = True
    return {"ids": ids, "positions": positions, "attends": attends, "predicts": predicts}


def in_one_row(packed: Sequence[PackedLesson], pad: int) -> dict[str, Any]:
    """All lessons behind each other; only the end of the row is padded."""
    total = sum(len(lesson.ids) for lesson in packed)
    ids = torch.full((1, total + -total % LENGTH_MULTIPLE), pad)
    positions, predicts = torch.zeros_like(ids), torch.zeros(ids.shape, dtype=torch.bool)
    segments, start = [], 0
    for lesson in packed:
        stop = start + len(lesson.ids)
        ids[0, start:stop], positions[0, start:stop] = lesson.ids, lesson.positions
        predicts[0, start + predictor_of(lesson)] = True
        is_plain = int(lesson.branch.max()) <= 1 and int(lesson.branch.min()) == int(lesson.branch.max())
        segments.append(Segment(start, stop, None if is_plain else attention_of(lesson.branch)))
        start = stop
    return {"ids": ids, "positions": positions, "predicts": predicts, "segments": segments}


def answers_of(packed: Sequence[PackedLesson]) -> dict[str, Tensor]:
    """Targets and weights (S,), lesson by lesson, in the order of the places that predict them."""
    targets, weights = [], []
    for lesson in packed:
        # Sorted, because boolean indexing of the hidden states reads them in order.
        order = predictor_of(lesson).argsort()
        targets.append(lesson.ids[lesson.supervised][order])
        weights.append(lesson.weights[lesson.supervised][order])
    return {"targets": torch.cat(targets), "weights": torch.cat(weights)}


def attention_of(branch: Tensor) -> Tensor:
    """(T, T) bool: which places (columns) each place (row) attends to, given the branch (T,) of each."""
    places = torch.arange(len(branch))
    causal = places[:, None] >= places[None, :]
    return causal & ((branch[None, :] == 0) | (branch[:, None] == branch[None, :]))


def predictor_of(lesson: PackedLesson) -> Tensor:
    """For each supervised place, the place that predicts it: the one before it in its own conversation."""
    places = lesson.supervised.nonzero().flatten()
    if (lesson.branch[places - 1] != lesson.branch[places]).any():
        raise ValueError("a supervised token stands right after the shared beginning; every answer needs a question")
    return places - 1
