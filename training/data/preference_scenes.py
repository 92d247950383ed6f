"""Make pairs from generated scenes: true answers against plausible wrong ones, captions against what they imagine."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training.data.samples import CAPTION_QUESTIONS, pick, sentence
from training.data.scene_facts import BACKGROUNDS, CENTRES, COLOURS, LOOKALIKE, SHAPES, WORDS
from training.data.scene_wording import Question, plural
from training.data.scenes import Scene
from training.evaluation.answers import normalised

NAMED = {word: (word, "") for word in (*COLOURS, *SHAPES)} | {plural(shape): (shape, "s") for shape in SHAPES}
CAPTION_SHARE = 0.4  # of the pairs


@dataclass(frozen=True)
class Answers:
    """A question and two answers to it."""

    question: str
    chosen: str
    rejected: str


def scene_pair(scene: Scene, generator: np.random.Generator) -> Answers:
    """A pair about `scene`: about a question of it, or about its caption."""
    caption = pick(scene.captions, generator)
    imagined = imagining(caption, scene, generator) if generator.random() < CAPTION_SHARE else None
    if imagined is not None:
        return Answers(pick(CAPTION_QUESTIONS, generator), sentence(caption), sentence(imagined))
    question = scene.questions[int(generator.integers(len(scene.questions)))]
    return Answers(question.question, question.answer, wrong_answer(question, generator))


def wrong_answer(question: Question, generator: np.random.Generator) -> str:
    """An answer of the same sort as the right one, and not that one. Raises ValueError where there is no such sort."""
    right = question.answer
    if question.choices:
        others = [choice for choice in question.choices if normalised(choice) != normalised(right)]
        return pick(others, generator)
    for sort in (tuple(COLOURS), SHAPES, tuple(CENTRES), tuple(BACKGROUNDS), tuple(WORDS)):
        if right in sort:
            return pick([other for other in sort if other != right and LOOKALIKE.get(other) != right], generator)
    if right.isdigit():
        return _wrong_number(right, generator)
    if len(right) == 1:
        return pick([letter for letter in "abcdefghijklmnopqrstuvwxyz" if letter != right], generator)
    raise ValueError(f"nobody knows what else {right!r} could be, asked {question.question!r}")


def _wrong_number(right: str, generator: np.random.Generator) -> str:
    """Of one digit a neighbour, as miscounting gives; of several another digit somewhere."""
    if len(right) == 1:
        return str(pick([str(n) for n in (int(right) - 1, int(right) + 1) if 0 <= n <= 9], generator))
    place = int(generator.integers(len(right)))
    digit = pick([digit for digit in "123456789" if digit != right[place]], generator)
    return right[:place] + digit + right[place + 1 :]


def imagining(caption: str, scene: Scene, generator: np.random.Generator) -> str | None:
    """`caption` with one colour, shape, word or number put in place of another that is not in `scene`.

    None where the caption names nothing that could be another thing.
    """
    words = caption.split(" ")
    places = [place for place in range(len(words)) if _names_something(words, place)]
    if not places:
        return None
    place = places[int(generator.integers(len(places)))]
    bare = words[place].rstrip(",;")
    is_written = words[place - 1] == "word" if place else False
    instead = _another_word(bare, generator) if is_written else _instead_of(bare, scene, generator)
    changed = [*words]
    changed[place] = instead + words[place][len(bare) :]
    if place and changed[place - 1] in ("a", "an"):
        changed[place - 1] = "an" if instead[0] in "aeiou" else "a"
    return " ".join(changed)


def _names_something(words: Sequence[str], place: int) -> bool:
    """Whether a thing is named there; the colour of a background and the number of objects are no things."""
    before = words[place - 1] if place else ""
    if before in ("word", "number"):
        return True
    behind = words[place + 1] if place + 1 < len(words) else ""
    return words[place].rstrip(",;") in NAMED and behind != "background" and before not in ("light", "dark")


def _another_word(word: str, generator: np.random.Generator) -> str:
    return pick([other for other in WORDS if other != word], generator)


def _instead_of(word: str, scene: Scene, generator: np.random.Generator) -> str:
    if word.isdigit():
        return _wrong_number(word, generator)
    name, ending = NAMED[word]
    present = names_in(scene)
    if name in COLOURS:
        return pick([other for other in COLOURS if other not in present], generator)
    absent = [other for other in SHAPES if other not in present and LOOKALIKE.get(other) not in present]
    other = pick(absent, generator)
    return plural(other) if ending else other


def names_in(scene: Scene) -> frozenset[str]:
    """The colours and shapes of what `scene` shows, its background left out."""
    said = " ".join(text for texts in scene.statements for text in texts)
    said += " " + " ".join(word for region in scene.regions for word in region.words)
    said += " " + " ".join(re.sub(r"(light |dark )?\w+ background", "", caption) for caption in scene.captions)
    said += " " + " ".join(f"{one.question} {one.answer}" for one in scene.questions if one.kind == "chart")
    return frozenset(NAMED[word][0] for word in re.findall(r"\w+", said) if word in NAMED)


def imagined_names(caption: str, scene: Scene) -> tuple[int, int]:
    """How many colours and shapes `caption` names, and how many of these are not in `scene`.

    The second over the first, summed over captions, is CHAIR_i (Rohrbach et al. 2018) on our small vocabulary. A name
    counts once; the colour of a background is no thing; a circle for a ring and a square for a diamond are let pass.
    """
    said = re.sub(r"(light |dark )?\w+ background", "", caption.lower())
    named = {NAMED[word][0] for word in re.findall(r"\w+", said) if word in NAMED}
    present = names_in(scene)
    return len(named), sum(name not in present and LOOKALIKE.get(name) not in present for name in named)
