"""Measures a model folder and writes its scores as JSON: `scripts/measure_joey.py MODEL --data FOLDER --out FILE`."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from assistant.answering import Assistant
from assistant.models import ModelError
from training.data.pictures import DataError
from training.evaluation.card import model_card
from training.evaluation.scorecard import measure


def main(
    model: Annotated[Path, typer.Argument(help="Folder of the model.", exists=True, file_okay=False)],
    out: Annotated[Path, typer.Option(help="Where the scores go, as JSON.")],
    data: Annotated[
        Path | None,
        typer.Option(
            envvar="KANGAROO_DATA", help="Folder of the picture shards; without one, scenes alone.", exists=True
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=2, help="At most so many pictures and scenes, for a quick look.")
    ] = None,
    scenes: Annotated[int, typer.Option(min=1, help="Number of generated scenes.")] = 500,
    card: Annotated[bool, typer.Option("--card", help="Also write the model's card into its folder.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Requests answered at once.")] = 64,
) -> None:
    """Measure MODEL on unseen scenes, on captions of Flickr8k validation and on yes/no questions of COCO validation."""
    start = time.monotonic()
    try:
        assistant = Assistant.load(model)
    except ModelError as error:
        raise typer.BadParameter(str(error), param_hint="MODEL") from error
    try:
        report = measure(assistant, data, limit, scenes, batch)
    except DataError as error:
        raise typer.BadParameter(str(error), param_hint="--data") from error
    report = {"model": model.resolve().name, "seconds": round(time.monotonic() - start), **report}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if card:
        provenance = json.loads((model / "provenance.json").read_text(encoding="utf-8"))
        (model / "README.md").write_text(model_card(provenance, report), encoding="utf-8")
    typer.echo(f"scores written to {out}")


if __name__ == "__main__":
    typer.run(main)
