"""Answers the questions of generated scenes from the pixels alone, sharing no code with what draws or asks.

It sees by connected components: the colour is the nearest named one, the shape is told by how far the outline is from
the middle, all the way around (a star swings five times, a triangle three times).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from training.data.scene_facts import BACKGROUNDS, COLOURS, SHAPES

SIDES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "middle": (0, 0)}


@dataclass(frozen=True)
class Seen:
    """One thing in a picture; places and lengths are shares of the side."""

    colour: str
    shape: str
    x: float
    y: float
    height: float
    across: float


def nearest(colour: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str:
    return min(names, key=lambda name: float(np.abs(np.array(names[name]) - colour).sum()))


def border(image: Image.Image) -> np.ndarray:
    """(pixels, 3): the outermost pixels."""
    pixels = np.asarray(image, dtype=float)
    return np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])


def shifted(values: np.ndarray) -> list[np.ndarray]:
    """The array moved by one pixel in each of the four directions, with zeros moved in."""
    padded = np.pad(values, 1)
    return [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]


def eroded(mask: np.ndarray) -> np.ndarray:
    return np.logical_and.reduce([mask, *shifted(mask)])


def components(mask: np.ndarray) -> list[np.ndarray]:
    """One mask for each connected part: the highest pixel number spreads over a part until nothing changes."""
    numbers = np.arange(1, mask.size + 1, dtype=np.int32).reshape(mask.shape) * mask
    while True:
        spread = np.maximum.reduce([numbers, *shifted(numbers)]) * mask
        if (spread == numbers).all():
            return [numbers == number for number in np.unique(numbers) if number]
        numbers = spread


def see(image: Image.Image, threshold: float = 60) -> list[Seen]:
    """Everything that differs from the background, as separate things."""
    pixels = np.asarray(image, dtype=float)
    background = np.median(border(image), axis=0)
    things = []
    for mask in components(np.abs(pixels - background).sum(axis=2) > threshold):
        rows, columns = np.nonzero(mask)
        if len(rows) < (0.04 * image.width) ** 2:
            continue
        # The edges are mixed with the background, so the colour comes from the inside.
        inside = eroded(eroded(mask))
        colour = nearest(np.median(pixels[inside if inside.any() else mask], axis=0), COLOURS)
        height, width = int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1
        x, y = float(columns.min() + columns.max()) / 2 / image.width, float(rows.min() + rows.max()) / 2 / image.height
        things.append(Seen(colour, shape_of(mask), x, y, height / image.height, max(height, width) / image.width))
    return things


def shape_of(mask: np.ndarray) -> str:
    """Tells the shape of one component by its outline, in polar coordinates around its centre of mass."""
    rows, columns = np.nonzero(mask)
    if not mask[round(rows.mean()), round(columns.mean())]:
        return "ring"
    edge_rows, edge_columns = np.nonzero(mask & ~eroded(mask))
    down, right = edge_rows - rows.mean(), edge_columns - columns.mean()
    angles = np.arctan2(down, right)
    order = np.argsort(angles)
    turns = np.linspace(-np.pi, np.pi, 128, endpoint=False)
    radii = np.interp(turns, angles[order], np.hypot(down, right)[order], period=2 * np.pi)
    waves = np.fft.rfft(radii)
    swing = np.abs(waves) / np.abs(waves[0])
    strongest = int(np.argmax(swing[1:9])) + 1
    if swing[strongest] < 0.02:
        return "circle"
    if strongest == 4:
        return "cross" if swing[4] > 0.1 else "diamond" if waves[4].real > 0 else "square"
    if strongest == 3:
        up, down = radii[32], radii[96]
        return "triangle" if up > down else "heart"
    return "star" if strongest == 5 else f"unknown ({strongest})"


def matching(phrase: str, things: list[Seen]) -> list[Seen]:
    """Everything that a noun phrase such as "red shapes", "the circle" or "an orange star" fits."""
    words = phrase.split()
    colours = [word for word in words if word in COLOURS]
    shapes = [shape for shape in SHAPES for word in words if word in (shape, shape + "s", shape + "es")]
    return [thing for thing in things if thing.colour in (colours or COLOURS) and thing.shape in (shapes or SHAPES)]


def the(phrase: str, things: list[Seen]) -> Seen:
    """The one thing that the phrase fits."""
    found = matching(phrase, things)
    assert len(found) == 1, f"'the {phrase}' fits {len(found)} of {things}"
    return found[0]


def at(place: str, things: list[Seen]) -> Seen:
    """The one thing that stands nearest to a side of the picture or to its middle, by a clear distance."""
    right, down = SIDES[place]
    ranked = sorted(things, key=lambda thing: abs(thing.x - 0.5 - right / 2) + abs(thing.y - 0.5 - down / 2))
    return ranked[0]


def holds(thing: Seen, place: str) -> bool:
    """Whether the thing is in that part of the picture, cut into three by three."""
    right, down = SIDES[place]
    x, y = (thing.x > 2 / 3) - (thing.x < 1 / 3), (thing.y > 2 / 3) - (thing.y < 1 / 3)
    return (x, y) == (0, 0) if place == "middle" else bool((right and x == right) or (down and y == down))


def stands(first: Seen, relation: str, second: Seen) -> bool:
    across, down = first.x - second.x, first.y - second.y
    horizontal = abs(across) > abs(down)
    return {
        "to the left of": horizontal and across < 0,
        "to the right of": horizontal and across > 0,
        "above": not horizontal and down < 0,
        "below": not horizontal and down > 0,
    }[relation]


# (wording, what the groups of the wording and the things seen make of it)
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
READINGS: list[tuple[str, Callable[..., object]]] = [
    (r"How many objects (?:are in the picture|do you see)\?", lambda seen: len(seen)),
    (r"(?:How many|Count the) (.+?)(?: are there\?| do you see\?| are in the picture\?|\.)",
     lambda seen, n: len(matching(n, seen))),
    (r"Are there exactly (\w+) (.+)\?", lambda seen, k, n: len(matching(n, seen)) == NUMBERS[k]),
    (r"Is there exactly one (.+)\?", lambda seen, n: len(matching(n, seen)) == 1),
    (r"Are there more (.+) than (.+)\?", lambda seen, a, b: len(matching(a, seen)) > len(matching(b, seen))),
    (r"Are there more (.+) or more (.+)\?", lambda seen, a, b: max(a, b, key=lambda n: len(matching(n, seen)))),
    (r"(?:Is there|Do you see) an? (\w+ \w+)(?: in the picture)?\?", lambda seen, n: bool(matching(n, seen))),
    (r"(?:What|Which) shape.* (?:this|these|shown|in the picture|do you see)\?",
     lambda seen: one({t.shape for t in seen})),
    (r"(?:What|Which) (?:colour|color) are the (.+)\?", lambda seen, n: one({t.colour for t in matching(n, seen)})),
    (r"(?:Which shape|What) is (?:on|at|in) the (left|right|top|bottom|middle)\?", lambda seen, p: at(p, seen).shape),
    (r"What colour is the shape (?:on|at|in) the (left|right|top|bottom|middle)\?", lambda seen, p: at(p, seen).colour),
    (r"What colour is the (?:larger|bigger) shape\?", lambda seen: large(seen).colour),
    (r"What colour is the smaller shape\?", lambda seen: small(seen).colour),
    (r"Which shape is (?:larger|bigger)\?|Which is (?:larger|bigger), .*\?", lambda seen: large(seen).shape),
    (r"Which shape is smaller\?|Which is smaller, .*\?", lambda seen: small(seen).shape),
    (r"Is the (.+) (larger|bigger|smaller) than the (.+)\?",
     lambda seen, a, word, b: (the(a, seen).across > the(b, seen).across) == (word != "smaller")),
    (r"Is the (.+) (?:large or small|small or large)\?", lambda seen, n: size(the(n, seen), seen)),
    (r"Is the (.+) (large|small)\?", lambda seen, n, word: size(the(n, seen), seen) == word),
    (r"Which shape is (to the left of|to the right of|above|below) the (.+)\?",
     lambda seen, r, n: one({t.shape for t in seen if t != the(n, seen) and stands(t, r, the(n, seen))})),
    (r"Is the (.+) (?:above or below|below or above) the (.+)\?",
     lambda seen, a, b: "above" if stands(the(a, seen), "above", the(b, seen)) else "below"),
    (r"Is the (.+) to the \w+ or to the \w+ of the (.+)\?",
     lambda seen, a, b: "left" if stands(the(a, seen), "to the left of", the(b, seen)) else "right"),
    (r"Is the (.+) (to the left of|to the right of|above|below) the (.+)\?",
     lambda seen, a, r, b: stands(the(a, seen), r, the(b, seen))),
    (r"In which corner is the (.+)\?", lambda seen, n: corner(the(n, seen))),
    (r"Where (?:in the picture )?is the (.+)\?|In which part of the picture is the (.+)\?",
     lambda seen, a, b: one({place for place in SIDES if holds(the(a or b, seen), place)})),
    (r"Is the (.+) (?:on|at) the (\w+) or (?:on|at) the (\w+)\?",
     lambda seen, n, a, b: one({place for place in (a, b) if holds(the(n, seen), place)})),
    (r"Is the (.+) (?:on|at|in) the (left|right|top|bottom|middle)(?: of the picture)?\?",
     lambda seen, n, place: holds(the(n, seen), place)),
    (r"(?:What|Which) shape is the (.+)\?|What is the shape of the (.+)\?", lambda seen, a, b: the(a or b, seen).shape),
    (r"Which shape is (\w+)\?", lambda seen, n: the(n, seen).shape),
    (r"(?:What|Which) (?:colour|color) is the (.+)\?|What is the colour of the (.+)\?|"
     r"Which colour does the (.+) have\?",
     lambda seen, a, b, c: the(a or b or c, seen).colour),
    (r"Is the (.+) an? (\w+) or an? (\w+)\?", lambda seen, n, a, b: one({the(n, seen).shape} & {a, b})),
    (r"Is the (.+) an? (\w+)\?", lambda seen, n, shape: the(n, seen).shape == shape),
    (r"Is the (.+) (\w+) or (\w+)\?", lambda seen, n, a, b: one({the(n, seen).colour} & {a, b})),
    (r"Is the (.+) (\w+)\?", lambda seen, n, colour: the(n, seen).colour == colour),
]  # fmt: skip


def one(found: set[str]) -> str:
    assert len(found) == 1, f"not one answer: {found}"
    return found.pop()


def large(things: list[Seen]) -> Seen:
    first, second = sorted(things, key=lambda thing: -thing.across)
    assert first.across >= 1.6 * second.across, f"not clearly larger: {things}"
    return first


def small(things: list[Seen]) -> Seen:
    return next(thing for thing in things if thing != large(things))


def size(thing: Seen, things: list[Seen]) -> str:
    return "large" if thing == large(things) else "small"


def corner(thing: Seen) -> str:
    return f"{'top' if thing.y < 0.5 else 'bottom'} {'left' if thing.x < 0.5 else 'right'}"


def read(question: str, image: Image.Image, things: list[Seen]) -> str:
    """The answer from the pixels.

    Raises:
        AssertionError: where the question has no answer or several, or is none that this reader knows.
    """
    if re.fullmatch(r"(What|Which) colour is the background\?", question):
        return nearest(np.median(border(image), axis=0), BACKGROUNDS)
    for wording, reading in READINGS:
        match = re.fullmatch(wording, question)
        if match:
            answer = reading(things, *match.groups())
            return {True: "yes", False: "no"}[answer] if isinstance(answer, bool) else str(answer)
    raise AssertionError(f"nobody taught the reader to read: {question}")
