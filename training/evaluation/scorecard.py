"""Measures an assistant on what it never saw: generated scenes, captions of photographs, yes/no questions on them."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any, Protocol

from rich.progress import track

from assistant.answering import Request
from assistant.questions import CAPTION_QUESTION
from training.data.pictures import DataError, PictureRow, picture_of, read_rows
from training.data.scenes import EVALUATION_SEED, make_scene
from training.evaluation.answers import accuracy, accuracy_by_kind
from training.evaluation.captions import moved, score_captions

CAPTIONED_SHARD = "flickr8k-validation"
YES_NO_SHARD = "coco-validation"
CAPTION_TOKENS = 32
ANSWER_TOKENS = 8
SAMPLES = 10


class Answering(Protocol):
    """What is measured: an `assistant.answering.Assistant`, or anything else that answers requests greedily."""

    def answer_batch(self, requests: Sequence[Request], max_new_tokens: int = 64) -> list[str]: ...


def measure(
    assistant: Answering, data: Path | None, limit: int | None = None, scenes: int = 500, batch: int = 64
) -> dict[str, Any]:
    """Everything that a model card tells, ready for JSON.

    Args:
        data: the folder of the picture shards; with None only generated scenes are measured.
        limit: at most so many scenes and pictures of each shard (CIDEr then has another scale, see `score_captions`).
        batch: requests answered at once.

    Raises:
        DataError: a shard that is missing or damaged.
    """
    number = scenes if limit is None else min(scenes, limit)
    report: dict[str, Any] = {"scenes": measure_scenes(assistant, number, batch)}
    if data is not None:
        report[CAPTIONED_SHARD] = measure_captions(assistant, read_rows(data, CAPTIONED_SHARD)[:limit], batch)
        report[YES_NO_SHARD] = measure_yes_no(assistant, read_rows(data, YES_NO_SHARD)[:limit], batch)
    return report


def measure_scenes(assistant: Answering, number: int, batch: int = 64) -> dict[str, Any]:
    """Accuracy by kind of question on `number` scenes from `EVALUATION_SEED` on, beside the commonest answer's."""
    requests, kinds, expected = [], [], []
    for seed in range(EVALUATION_SEED, EVALUATION_SEED + number):
        scene = make_scene(seed)
        for question in scene.questions:
            requests.append(Request(question.question, (scene.image,)))
            kinds.append(question.kind)
            expected.append(question.answer)
    given = answer_all(assistant, requests, "questions about scenes", ANSWER_TOKENS, batch)
    by_kind = accuracy_by_kind(kinds, given, expected)
    return {
        "scenes": number,
        "first_seed": EVALUATION_SEED,
        "all": asdict(accuracy(given, expected)),
        "by_kind": {kind: asdict(score) for kind, score in by_kind.items()},
    }


def measure_captions(assistant: Answering, rows: Sequence[PictureRow], batch: int = 64) -> dict[str, Any]:
    """BLEU-4 and CIDEr, the same with every caption moved to another picture, and captions of pictures drawn by lot."""
    requests = [Request(CAPTION_QUESTION, (picture_of(row),)) for row in rows]
    captions = answer_all(assistant, requests, f"captions of {CAPTIONED_SHARD}", CAPTION_TOKENS, batch)
    references = [row.captions for row in rows]
    drawn = sorted(Random(0).sample(range(len(rows)), min(SAMPLES, len(rows))))
    return {
        "pictures": len(rows),
        **asdict(score_captions(captions, references)),
        "moved": asdict(score_captions([captions[place] for place in moved(len(rows))], references)),
        "distinct_captions": len(set(captions)),
        "unchosen": [{"id": rows[n].id, "caption": captions[n], "people": list(rows[n].captions)} for n in drawn],
    }


def measure_yes_no(assistant: Answering, rows: Sequence[PictureRow], batch: int = 64) -> dict[str, Any]:
    """Accuracy on people's yes/no questions, beside the commonest answer's; an answer that is neither is wrong."""
    asked = [(row, q) for row in rows for q in row.questions if q.answer.lower() in ("yes", "no")]
    if not asked:
        raise DataError(f"none of the {len(rows)} pictures of {YES_NO_SHARD} has a question answered yes or no")
    pictures = {row.id: picture_of(row) for row, _ in asked}
    requests = [Request(question.question, (pictures[row.id],)) for row, question in asked]
    given = answer_all(assistant, requests, f"questions of {YES_NO_SHARD}", ANSWER_TOKENS, batch)
    score = accuracy(given, [question.answer for _, question in asked])
    said_yes = sum(answer.strip(" .").lower() == "yes" for answer in given)
    return {"pictures": len(pictures), **asdict(score), "said_yes": said_yes / len(given)}


def answer_all(
    assistant: Answering, requests: Sequence[Request], what: str, max_new_tokens: int, batch: int
) -> list[str]:
    """Answers to all requests in their order, `batch` at a time; a bar on the terminal shows how far it is."""
    # Neighbours of like length waste the least on padding.
    order = sorted(range(len(requests)), key=lambda number: len(requests[number].question))
    answers = [""] * len(requests)
    for start in track(range(0, len(order), batch), description=what):
        places = order[start : start + batch]
        found = assistant.answer_batch([requests[place] for place in places], max_new_tokens=max_new_tokens)
        for place, answer in zip(places, found, strict=True):
            answers[place] = answer
    return answers
