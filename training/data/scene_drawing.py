"""Draws the facts of a scene with Pillow, and decides nothing that a question could be about."""

import math
from functools import lru_cache
from random import Random

from PIL import Image, ImageDraw, ImageFont

from training.data.scene_facts import BACKGROUNDS, COLOURS, Facts, Item, Written

OVERSAMPLING = 2  # drawn this much larger and averaged down, because ImageDraw itself does not antialias
Colour = tuple[int, int, int]
Point = tuple[float, float]
Points = tuple[Point, ...]
Box = tuple[float, float, float, float]


def draw(facts: Facts, side: int, random: Random) -> tuple[Image.Image, tuple[Box, ...]]:
    """Draws an RGB picture of `side` x `side` pixels. Jitter of the colours comes from `random`.

    Beside it stand the boxes of the words of a page: left, top, right and bottom, as shares of the side.
    """
    large_side = side * OVERSAMPLING
    image = _background(jitter(BACKGROUNDS[facts.background], 4, random), large_side, random)
    canvas = ImageDraw.Draw(image)
    if facts.text:
        shown = facts.text.upper() if facts.capitals else facts.text
        _draw_text(canvas, shown, jitter(COLOURS[facts.text_colour], 8, random), large_side, random, facts.text_height)
    boxes = [_draw_in_corner(canvas, written, large_side, random, facts.text_height) for written in facts.page]
    if facts.bars:
        _draw_chart(canvas, facts, large_side, random)
    for item in facts.items:
        _draw_item(canvas, item, jitter(COLOURS[item.colour], 10, random), large_side)
    return image.reduce(OVERSAMPLING), tuple(boxes)


def jitter(colour: Colour, most: int, random: Random) -> Colour:
    """Moves the brightness by up to `most` levels of 255, and each channel by a third of that: grey must stay grey."""
    shift = random.randint(-most, most)
    red, green, blue = (min(255, max(0, channel + shift + random.randint(-most // 3, most // 3))) for channel in colour)
    return red, green, blue


def _background(colour: Colour, side: int, random: Random) -> Image.Image:
    """A plain ground that half of the time shades by a few levels from one edge to the other."""
    plain = Image.new("RGB", (side, side), colour)
    if random.random() < 0.5:
        return plain
    away = 10 if sum(colour) < 380 else -10
    shade = Image.new("RGB", (side, side), tuple(min(255, max(0, channel + away)) for channel in colour))
    ramp = _ramp(side).rotate(random.choice((0, 90, 180, 270)))
    return Image.composite(shade, plain, ramp)


@lru_cache(maxsize=8)
def _ramp(side: int) -> Image.Image:
    return Image.linear_gradient("L").resize((side, side))


def _draw_item(canvas: ImageDraw.ImageDraw, item: Item, colour: Colour, side: int) -> None:
    x, y, radius = item.x * side, item.y * side, item.diameter * side / 2
    box = (x - radius, y - radius, x + radius, y + radius)
    if item.shape == "circle":
        canvas.ellipse(box, fill=colour)
    elif item.shape == "ring":
        canvas.ellipse(box, outline=colour, width=round(radius * 0.42))
    else:
        sine, cosine = math.sin(math.radians(item.tilt)), math.cos(math.radians(item.tilt))
        outline = [
            (x + radius * (across * cosine - down * sine), y + radius * (across * sine + down * cosine))
            for across, down in OUTLINES[item.shape]
        ]
        canvas.polygon(outline, fill=colour)


def _star() -> Points:
    angles = [math.pi * step / 5 - math.pi / 2 for step in range(10)]
    return tuple(
        (math.cos(angle) * (1, 0.42)[step % 2], math.sin(angle) * (1, 0.42)[step % 2])
        for step, angle in enumerate(angles)
    )


def _heart() -> Points:
    """The common parametric heart, 16 sin^3 t and 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, scaled into the unit box."""
    turns = [2 * math.pi * step / 48 for step in range(48)]
    return tuple(
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) + 2.5) / 16,
        )
        for t in turns
    )


_ARM = 0.34
# Corners, clockwise, in a box from -1 to 1 with y pointing down.
OUTLINES: dict[str, Points] = {
    "square": ((-0.92, -0.92), (0.92, -0.92), (0.92, 0.92), (-0.92, 0.92)),
    "triangle": ((0, -0.95), (1, 0.85), (-1, 0.85)),
    "diamond": ((0, -1), (0.8, 0), (0, 1), (-0.8, 0)),
    "star": _star(),
    "heart": _heart(),
    "cross": (
        (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
        (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM),
    ),
}  # fmt: skip


@lru_cache(maxsize=256)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, so that a scene looks the same on a machine without any."""
    font = ImageFont.load_default(size=size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("this Pillow was built without FreeType, which words in scenes need: install Pillow's wheel")
    return font


def _draw_text(
    canvas: ImageDraw.ImageDraw, text: str, colour: Colour, side: int, random: Random, height: float
) -> None:
    """Writes `text`, as large as fits into a random share of the width where `height` is 0, somewhere inside."""
    width_share, x_share, y_share = random.uniform(0.72, 0.9), random.random(), random.random()
    left, _, right, _ = _font(100).getbbox(text)
    size = int(height * side or min(100 * width_share * side / (right - left), 0.5 * side))
    _write(canvas, text, colour, size, (0, 0, side, side), (x_share, y_share))


def _draw_in_corner(canvas: ImageDraw.ImageDraw, written: Written, side: int, random: Random, height: float) -> Box:
    """Writes a word somewhere in its quarter of the picture; its box, as shares of the side."""
    colour, half = jitter(COLOURS[written.colour], 8, random), side / 2
    left = half if "right" in written.place else 0
    top = half if "bottom" in written.place else 0
    shares = random.random(), random.random()
    box = _write(canvas, written.word, colour, int(height * side), (left, top, left + half, top + half), shares)
    return box[0] / side, box[1] / side, box[2] / side, box[3] / side


def _write(canvas: ImageDraw.ImageDraw, text: str, colour: Colour, size: int, room: Box, shares: Point) -> Box:
    """Writes `text` in `room` (left, top, right, bottom), off its left and top by `shares` of what is left; its box."""
    font, margin, bold = _font(size), 0.04 * (room[2] - room[0]), size // 40
    left, top, right, bottom = font.getbbox(text, stroke_width=bold)
    wide, high = right - left, bottom - top
    x = room[0] + margin + shares[0] * (room[2] - room[0] - 2 * margin - wide)
    y = room[1] + margin + shares[1] * (room[3] - room[1] - 2 * margin - high)
    canvas.text((x - left, y - top), text, fill=colour, font=font, stroke_width=bold, stroke_fill=colour)
    return x, y, x + wide, y + high


def _draw_chart(canvas: ImageDraw.ImageDraw, facts: Facts, side: int, random: Random) -> None:
    """Draws bars over a fixed scale from 0 to 5, with a labelled line for every whole number."""
    dark = sum(BACKGROUNDS[facts.background]) < 380
    ink, faint = ((235, 235, 235), (110, 110, 115)) if dark else ((40, 40, 40), (165, 165, 170))
    left, right, base, step = 0.15 * side, 0.96 * side, 0.92 * side, 0.165 * side
    line = max(1, side // 160)
    for value in range(6):
        y = base - value * step
        canvas.line((left, y, right, y), fill=ink if value == 0 else faint, width=line)
        canvas.text((left - 0.03 * side, y), str(value), fill=ink, font=_font(int(0.085 * side)), anchor="rm")
    canvas.line((left, base, left, base - 5.3 * step), fill=ink, width=line)
    slot = (right - left) / len(facts.bars)
    share = random.uniform(0.55, 0.75)
    for index, (colour, height) in enumerate(facts.bars):
        x = left + slot * (index + 0.5)
        box = (x - slot * share / 2, base - height * step, x + slot * share / 2, base)
        canvas.rectangle(box, fill=jitter(COLOURS[colour], 10, random))
