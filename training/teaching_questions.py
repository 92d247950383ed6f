"""What a model is asked before and after: rows that were kept aside, generated scenes, and what is not in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from assistant.answering import Assistant, Request
from assistant.chat import encode_conversation
from assistant.tiles import Processor, cut, token_counts
from assistant.towers import normalised
from training.config import InstructStage
from training.data.conversation_lessons import ConversationLessons
from training.data.lesson_judge import LessonJudge
from training.data.scenes import EVALUATION_SEED, Question, make_scene
from training.evaluation.scorecard import ANSWER_TOKENS, answer_all
from training.lesson_sets import lesson_sets
from training.objectives.instruct import InstructObjective, Lesson
from training.stages import Workshop

MOST_HELD_OUT = 64
KINDS = ("colour", "shape", "position", "count", "size", "word", "digits", "chart", "yes_no")
OF_EACH_KIND = 7  # 63 questions about scenes
ABSENT = 64  # questions about what is not in the scene
ASKS_FOR_PRESENCE = ("Is there a ", "Is there an ", "Do you see ")
ANSWER_MARGIN = 8  # tokens more than the longest right answer; whatever is longer is wrong
LONGEST_ANSWER = 256
BATCH = 8  # pictures of a large model are hundreds of tokens each


@dataclass(frozen=True)
class HeldOutQuestion:
    """The first learned answer of a row, and the T tokens that training reads before it: earlier turns as written."""

    lesson: Lesson
    prompt: list[int]
    views: tuple[Tensor, ...]  # uint8 (3, H, W), those of the prompt, as the lesson has them
    question: str
    answer: str
    answer_tokens: int


@dataclass(frozen=True)
class SceneQuestion:
    """A question about a generated scene that nobody trains on."""

    picture: Image.Image
    question: Question


@dataclass(frozen=True)
class Examination:
    """Everything that is asked; the same before and after."""

    held_out: tuple[HeldOutQuestion, ...]
    known: tuple[SceneQuestion, ...]
    absent: tuple[SceneQuestion, ...]


@dataclass(frozen=True)
class Answers:
    """What one model said, in the order of the examination; the loss is the mean over learned tokens."""

    held_out: list[str]
    loss: float | None
    known: list[str]
    absent: list[str]


def examination_of(stage: InstructStage, workshop: Workshop, processor: Processor) -> Examination:
    """What is asked of the models before and after `stage`. Raises DataError where its data cannot be read."""
    known, absent = scene_questions()
    return Examination(held_out_questions(stage, workshop, processor), known, absent)


def held_out_questions(stage: InstructStage, workshop: Workshop, processor: Processor) -> tuple[HeldOutQuestion, ...]:
    """One of each conversation that `stage` kept aside, at most `MOST_HELD_OUT`, in the order of the file."""
    _, aside = lesson_sets(stage, LessonJudge(processor, stage.longest), workshop.data_folder, [], 1)
    sources = [source for source in aside.sources if isinstance(source, ConversationLessons)]
    lessons: dict[str, Lesson] = {}  # a refused row's place is taken by a neighbour, which is asked once
    for source in sources:
        for place in range(min(len(source), MOST_HELD_OUT)):
            lesson = source.sample(place, np.random.default_rng(0))
            lessons.setdefault(lesson.name, lesson)
    return tuple(_first_question(lesson, processor) for lesson in list(lessons.values())[:MOST_HELD_OUT])


def _first_question(lesson: Lesson, processor: Processor) -> HeldOutQuestion:
    messages = lesson.messages
    place = next(n for n, m in enumerate(messages) if m["role"] == "assistant" and m.get("supervised", True))
    pictures = sum(part["type"] == "image" for message in messages[:place] for part in message["content"])
    counts = token_counts(processor, lesson.views[:pictures])
    encoded = encode_conversation(processor.tokenizer, messages[: place + 1], counts)
    start = encoded.supervised.index(True)
    return HeldOutQuestion(
        lesson,
        encoded.ids[:start],
        lesson.views[:pictures],
        _words(messages[place - 1]),
        _words(messages[place]),
        len(encoded.ids) - start,
    )


def _words(message: dict[str, Any]) -> str:
    return "".join(part["text"] for part in message["content"] if part["type"] == "text").strip()


def scene_questions() -> tuple[tuple[SceneQuestion, ...], tuple[SceneQuestion, ...]]:
    """As many of each kind, and those about things that are not there; always the same, scene by scene."""
    known: dict[str, list[SceneQuestion]] = {kind: [] for kind in KINDS}
    absent: list[SceneQuestion] = []
    seed = EVALUATION_SEED
    while len(absent) < ABSENT or any(len(some) < OF_EACH_KIND for some in known.values()):
        scene = make_scene(seed)
        seed += 1
        # One of a kind from a scene: several about one picture are right or wrong together.
        for kind, question in {question.kind: question for question in reversed(scene.questions)}.items():
            if len(known[kind]) < OF_EACH_KIND:
                known[kind].append(SceneQuestion(scene.image, question))
        missing = (q for q in scene.questions if q.answer == "no" and q.question.startswith(ASKS_FOR_PRESENCE))
        absent += [SceneQuestion(scene.image, question) for question in missing]
    return tuple(one for some in known.values() for one in some), tuple(absent[:ABSENT])


def answers_of(assistant: Assistant, asked: Examination, longest: int, what: str) -> Answers:
    """What `assistant` answers, greedily. `longest` is the stage's; `what` stands before the bars."""
    return Answers(
        held_out=held_out_answers(assistant, asked.held_out, f"{what}: your questions"),
        loss=held_out_loss(assistant, asked.held_out, longest),
        known=_scene_answers(assistant, asked.known, f"{what}: generated scenes"),
        absent=_scene_answers(assistant, asked.absent, f"{what}: what is not there"),
    )


def _scene_answers(assistant: Assistant, asked: Sequence[SceneQuestion], what: str) -> list[str]:
    requests = [Request(one.question.question, (one.picture,)) for one in asked]
    return answer_all(assistant, requests, what, ANSWER_TOKENS, BATCH)


def held_out_answers(assistant: Assistant, asked: Sequence[HeldOutQuestion], what: str = "") -> list[str]:
    """The greedy answer to each prompt, exactly as training reads it."""
    answers = [""] * len(asked)
    order = sorted(range(len(asked)), key=lambda place: len(asked[place].prompt))  # the least padding
    for start in track(range(0, len(order), BATCH), description=what, disable=not asked):
        places = order[start : start + BATCH]
        for place, answer in zip(places, _continued(assistant, [asked[place] for place in places]), strict=True):
            answers[place] = answer
    return answers


def _continued(assistant: Assistant, asked: Sequence[HeldOutQuestion]) -> list[str]:
    model, tokenizer = assistant.model, assistant.processor.tokenizer
    inputs = tokenizer.pad({"input_ids": [one.prompt for one in asked]}, padding_side="left", return_tensors="pt")
    named = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    views = [view for one in asked for view in one.views]
    if views:
        seen, sizes = cut(assistant.processor, views)
        named["pixel_values"] = normalised(seen, assistant.processor.image_processor).to(model.dtype)
        named |= {} if sizes is None else {"image_sizes": sizes}
    most = min(LONGEST_ANSWER, max(one.answer_tokens for one in asked) + ANSWER_MARGIN)
    with torch.inference_mode():
        ids = model.generate(
            **{name: value.to(model.device) for name, value in named.items()}, max_new_tokens=most, do_sample=False
        )
    return [text.strip() for text in tokenizer.batch_decode(ids[:, named["input_ids"].shape[1] :], True)]


def held_out_loss(assistant: Assistant, asked: Sequence[HeldOutQuestion], longest: int) -> float | None:
    """Cross-entropy in nats, the mean over the learned tokens of all turns; None where nothing is asked."""
    if not asked:
        return None
    objective = InstructObjective(assistant.model, assistant.processor, (), longest).eval()
    total, tokens = 0.0, 0
    for start in range(0, len(asked), BATCH):
        batch = objective.collate([one.lesson for one in asked[start : start + BATCH]])
        there = {name: v.to(assistant.model.device) if isinstance(v, Tensor) else v for name, v in batch.items()}
        narrow = assistant.model.dtype == torch.bfloat16
        with torch.inference_mode(), torch.autocast(assistant.model.device.type, torch.bfloat16, enabled=narrow):
            mean = objective(**there)["answer_loss"]
        total += float(mean) * len(batch["targets"])
        tokens += len(batch["targets"])
    return total / tokens
