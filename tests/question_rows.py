"""A csv of questions about drawn scenes with the pictures beside it, as a person would write one."""

import csv
from collections.abc import Callable
from pathlib import Path

from training.data.scenes import make_scene


def write_question_rows(
    folder: Path, count: int, side: int = 80, of_each: int = 1, answer: Callable[[str], str] = str
) -> Path:
    """`rows.csv` in a new `folder`: `of_each` questions about each of `count` scenes; `answer` gets the right one."""
    folder.mkdir(parents=True)
    with (folder / "rows.csv").open("w", newline="") as file:
        written = csv.writer(file)
        written.writerow(["image", "question", "answer"])
        for seed in range(count):
            scene = make_scene(seed, side)
            scene.image.save(folder / f"{seed}.png")
            for asked in scene.questions[:of_each]:
                written.writerow([f"{seed}.png", asked.question, answer(asked.answer)])
    return folder / "rows.csv"
