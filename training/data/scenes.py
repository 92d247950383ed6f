"""Generated pictures with questions, answers and captions that are true by construction.

A scene is decided first (`scene_facts`), then drawn (`scene_drawing`), asked about (`scene_questions`) and described
(`scene_captions`). Everything is drawn from the seed, so one number names a picture and all its words, on any run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import get_args

from PIL import Image

from training.data.pictures import Region
from training.data.scene_captions import describe
from training.data.scene_drawing import draw
from training.data.scene_facts import KIND_WEIGHTS, SCENE_KINDS, Facts, Item, SceneKind, decide
from training.data.scene_questions import ask
from training.data.scene_statements import name, state
from training.data.scene_wording import Question

__all__ = [
    "EVALUATION_SEED",
    "LARGEST_SIDE",
    "SCENE_KINDS",
    "SMALLEST_SIDE",
    "Question",
    "Scene",
    "SceneKind",
    "kind_of",
    "make_scene",
    "words_of_scene",
]

EVALUATION_SEED = 1_000_000_000  # training stays below this seed and evaluation starts at it, so no scene is in both
SMALLEST_SIDE = 64  # below this the digits of a chart cannot be read
LARGEST_SIDE = 2048


@dataclass(frozen=True)
class Scene:
    """One picture (RGB, side x side) with two captions and four to eight questions about it.

    `statements` are short texts of one fact each, a tuple for each sort of fact; see `scene_statements`. `regions` are
    the boxes of its objects with words for each: shape, colour, place, numbers; on a page, of each word, which says it.
    """

    seed: int
    kind: str
    image: Image.Image
    captions: tuple[str, ...]
    questions: tuple[Question, ...]
    statements: tuple[tuple[str, ...], ...]
    regions: tuple[Region, ...]


def make_scene(seed: int, side: int = 160, kind: SceneKind | None = None) -> Scene:
    """Makes the scene that `seed` names.

    The words do not depend on `side`, and asking for the kind that a seed has anyway changes nothing.

    Args:
        seed: 0 or more. `EVALUATION_SEED` and above are never trained on.
        side: width and height in pixels.
        kind: drawn from the seed where None.

    Raises:
        ValueError: for a negative seed, a side outside 64 to 2048 pixels, or an unknown kind.
    """
    if not SMALLEST_SIDE <= side <= LARGEST_SIDE:
        raise ValueError(f"side is {side} pixels, and has to be from {SMALLEST_SIDE} to {LARGEST_SIDE}")
    facts, captions, questions, random = _decided(seed, kind)
    image, boxes = draw(facts, side, random)
    regions = tuple(_region_of(item, facts.items) for item in facts.items)
    regions += tuple(Region(box, (written.word,)) for box, written in zip(boxes, facts.page, strict=True))
    return Scene(seed, facts.kind, image, captions, questions, state(facts), regions)


def words_of_scene(seed: int, kind: SceneKind | None = None) -> tuple[tuple[str, ...], tuple[Question, ...]]:
    """Captions and questions of the scene that `make_scene` makes, which is not drawn: in a fifth of the time.

    Raises ValueError for a negative seed or an unknown kind.
    """
    _, captions, questions, _ = _decided(seed, kind)
    return captions, questions


def _decided(seed: int, kind: SceneKind | None) -> tuple[Facts, tuple[str, ...], tuple[Question, ...], Random]:
    """Facts and words of a scene, and what the rest of it is drawn from."""
    if seed < 0:
        raise ValueError(f"seed is {seed}, and has to be 0 or more")
    if kind is not None and kind not in get_args(SceneKind):
        raise ValueError(f"kind is {kind!r}, and has to be one of {', '.join(get_args(SceneKind))}")
    random = Random(seed)
    drawn_kind = random.choices(SCENE_KINDS, [KIND_WEIGHTS[name] for name in SCENE_KINDS])[0]
    facts = decide(kind or drawn_kind, random)
    return facts, describe(facts, random), ask(facts, random), random


def kind_of(index: int, kinds: Sequence[SceneKind]) -> SceneKind | None:
    """What the scene at place `index` of a source is to be: each of `kinds` in turn, or as its seed will have it."""
    return kinds[index % len(kinds)] if kinds else None


def _region_of(item: Item, items: tuple[Item, ...]) -> Region:
    """The box of one of `items`, without the small tilt, and its words."""
    half = item.diameter / 2
    return Region((item.x - half, item.y - half, item.x + half, item.y + half), name(item, items))
