"""Teaches Joey a lesson that it gets wrong, and measures the lesson and everything else before and after.

The lesson is made of labelled photographs of `--data` that no stage of Joey's recipe saw. Pictures are asked about
before training, and only those with a wrong answer are taught; others, never taught, tell what was learned.
"""

import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from assistant.answering import Assistant, Request
from assistant.models import JOEY
from training.data.pictures import PictureRow, picture_of, read_rows
from training.evaluation.answers import accuracy, normalised
from training.evaluation.scorecard import CAPTIONED_SHARD, YES_NO_SHARD, answer_all, measure
from training.evaluation.scores import wilson_interval

SHARD = "natural-train"
QUESTION = "What kind of place is this?"
ANSWER_TOKENS = 8
BATCH = 64


def asked(assistant: Assistant, rows: Sequence[PictureRow]) -> list[str]:
    """The answer to the lesson's question about each row."""
    requests = [Request(QUESTION, (picture_of(row),)) for row in rows]
    return answer_all(assistant, requests, "the lesson's pictures", ANSWER_TOKENS, BATCH)


def write_lesson(rows: Sequence[PictureRow], folder: Path) -> Path:
    """A csv of image, question and answer with the pictures beside it, as anybody would make one."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "lesson.csv"
    with file.open("w", newline="") as sink:
        table = csv.writer(sink)
        table.writerow(["image", "question", "answer"])
        for number, row in enumerate(rows):
            name = f"{number:04}.png"
            picture_of(row).save(folder / name)
            table.writerow([name, QUESTION, row.label])
    return file


def scores_of(assistant: Assistant, unseen: Sequence[PictureRow], data: Path, scenes: int) -> dict[str, Any]:
    """The lesson on pictures that are not taught, and what Joey's card tells of it."""
    lesson = accuracy(asked(assistant, unseen), [str(row.label) for row in unseen])
    return {"lesson": asdict(lesson), **measure(assistant, data, None, scenes, BATCH)}


def table_of(before: dict[str, Any], after: dict[str, Any]) -> Table:
    """Before and after, in percent (CIDEr as papers give it), with the interval of the share after."""
    table = Table("measure", "questions", "before", "after", "95 % interval")
    rows: list[tuple[str, str, str | None]] = [("the lesson, other pictures", "lesson", None)]
    rows += [(f"scenes: {kind}", "scenes", kind) for kind in before["scenes"]["by_kind"]]
    rows += [("scenes: all", "scenes", "all"), ("yes/no on photographs", YES_NO_SHARD, None)]
    for name, part, kind in rows:
        one, other = (_share(report[part], kind) for report in (before, after))
        low, high = wilson_interval(other["right"], other["questions"])
        shares = f"{100 * one['right']:.1f}", f"{100 * other['right']:.1f}", f"{100 * low:.1f} to {100 * high:.1f}"
        table.add_row(name, str(other["questions"]), *shares)
    captions = [f"{report[CAPTIONED_SHARD]['cider']:.1f}" for report in (before, after)]
    table.add_row("captions of photographs, CIDEr", str(after[CAPTIONED_SHARD]["pictures"]), *captions, "")
    return table


def _share(part: dict[str, Any], kind: str | None) -> dict[str, Any]:
    if kind is None:
        return part
    return part["all"] if kind == "all" else part["by_kind"][kind]


def main(
    data: Annotated[Path, typer.Option(envvar="KANGAROO_DATA", help="Folder of the picture shards.", exists=True)],
    out: Annotated[Path, typer.Option(help="Where lesson, runs and scores go.")] = Path("runs/lesson"),
    most: Annotated[int, typer.Option(min=16, help="Pictures that are taught.")] = 300,
    unseen: Annotated[int, typer.Option(min=16, help="Pictures that tell what was learned.")] = 400,
    scenes: Annotated[int, typer.Option(min=10, help="Generated scenes that tell what was forgotten.")] = 300,
    options: Annotated[str, typer.Option(help="Options of `kangaroo tune`, in one string.")] = "--replay 0.5",
) -> None:
    """Make the lesson, measure Joey, teach it with `kangaroo tune`, and measure it again."""
    rows = [row for row in read_rows(data, SHARD) if row.label]
    kept, candidates = rows[:unseen], rows[unseen:]
    joey = Assistant.load(JOEY)
    wrong = [
        row
        for row, given in zip(candidates, asked(joey, candidates), strict=True)
        if normalised(given) != normalised(str(row.label))
    ][:most]
    file = write_lesson(wrong, out / "data")
    before = scores_of(joey, kept, data, scenes)
    command = [sys.executable, "-m", "ui.command_line", "tune", "--data", str(file), "--out", str(out / "run")]
    subprocess.run([*command, *options.split()], check=True)
    after = scores_of(Assistant.load(out / "run" / "model"), kept, data, scenes)
    report = {"taught": len(wrong), "options": options, "before": before, "after": after}
    (out / "scores.json").write_text(json.dumps(report, indent=2) + "\n")
    Console().print(table_of(before, after))


if __name__ == "__main__":
    typer.run(main)
