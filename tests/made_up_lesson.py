"""A lesson that no model knows before: pictures of one shape each, and what it is called in a language made up."""

import io
import json
import random
from typing import Any

from PIL import Image, ImageDraw

from assistant.images import encode_data_url

QUESTION = "What is this called in Wallabese?"
WORDS = {"circle": "a zorp", "square": "a blick"}
COLOURS = ("red", "green", "blue", "orange", "purple", "brown")


def picture_of(shape: str, seed: int) -> Image.Image:
    """One `shape` on a light ground; colour, size and place hang on `seed`."""
    chance = random.Random(seed)
    picture = Image.new("RGB", (160, 160), chance.choice(("white", "lightyellow", "lightcyan")))
    side = chance.randint(50, 90)
    left, top = chance.randint(10, 150 - side), chance.randint(10, 150 - side)
    box = (left, top, left + side, top + side)
    draw = ImageDraw.Draw(picture)
    (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=chance.choice(COLOURS))
    return picture


def question_about(shape: str, seed: int) -> dict[str, Any]:
    """The user's message with the picture as a data URL."""
    shown = {"type": "image_url", "image_url": {"url": encode_data_url(picture_of(shape, seed))}}
    return {"role": "user", "content": [shown, {"type": "text", "text": QUESTION}]}


def rows(count: int, first_seed: int = 0) -> list[dict[str, Any]]:
    """`count` rows in OpenAI's form, the shapes in turn."""
    shapes = [list(WORDS)[number % len(WORDS)] for number in range(count)]
    return [
        {"messages": [question_about(shape, first_seed + number), {"role": "assistant", "content": WORDS[shape]}]}
        for number, shape in enumerate(shapes)
    ]


def as_lines(lesson: list[dict[str, Any]]) -> bytes:
    """JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in lesson).encode()


def lesson_file(count: int = 20, name: str = "lesson.jsonl") -> tuple[str, io.BytesIO]:
    """A file of `count` rows, as the openai client uploads one."""
    return name, io.BytesIO(as_lines(rows(count)))
