"""Lets Joey prefer, judge and be reinforced on generated scenes, and writes what each changed and how its reward rose.

Each part is the command that anybody would give, with its report of before and after. `scores.json` and the curves of
each run are in `--out`. `--model` and `--steps` make it small.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from training.after_tuning_report import REPORT
from training.callbacks import CURVES
from training.recipe import DONE
from training.run_log import RunLog, series

PARTS = {"preference": "prefer", "reward": "reward", "reinforce": "reinforce"}  # stage and command
NEVER = 10**9  # later than any step


def run_part(command: str, model: str | None, out: Path, options: list[str]) -> None:
    """Give the command, and let it say what it says."""
    named = [] if model is None else [model]
    subprocess.run(
        [sys.executable, "-m", "ui.command_line", command, *named, "--out", str(out), "--no-rehearsal", *options],
        check=True,
    )


def found_in(run: Path, stage: str) -> dict[str, Any]:
    """The held-out scores of a run, its report, and its curves by name: steps and values."""
    done = json.loads((run / stage / DONE).read_text())
    report = run / "model" / REPORT
    lines = RunLog(run / stage / "log.jsonl").lines(NEVER)
    curves = {name: series(lines, name) for name in ("reward", "margin", "preferred", "ranked_right", "eval_reward")}
    return {
        "seconds": done["seconds"],
        "held_out": done["scores"],
        "before_and_after": json.loads(report.read_text()) if report.is_file() else None,
        "curves": {name: curve for name, curve in curves.items() if curve[0]},
    }


def main(
    out: Annotated[Path, typer.Option(help="Where runs, curves and scores go.")] = Path("runs/prove-preference"),
    model: Annotated[str | None, typer.Option(help="Joey where unset.")] = None,
    part: Annotated[list[str] | None, typer.Option(help="preference, reward or reinforce; all where unset.")] = None,
    prefer_steps: Annotated[int, typer.Option(min=1)] = 150,
    reward_steps: Annotated[int, typer.Option(min=1)] = 150,
    reinforce_steps: Annotated[int, typer.Option(min=1)] = 90,
    scenes: Annotated[str, typer.Option(help="The kind of scene that is reinforced.")] = "small shape",
    ask: Annotated[str, typer.Option(help="The kind of question that is reinforced.")] = "yes_no",
) -> None:
    """Run the parts, and write down what they changed."""
    options = {
        "preference": ["--steps", str(prefer_steps), "--imitation", "0.1"],
        "reward": ["--steps", str(reward_steps)],
        "reinforce": ["--steps", str(reinforce_steps), "--scenes", scenes, "--ask", ask],
    }
    scores: dict[str, Any] = {}
    for stage in part or list(PARTS):
        run = out / stage
        run_part(PARTS[stage], model, run, options[stage])
        scores[stage] = found_in(run, stage)
        shutil.copyfile(run / stage / CURVES, out / f"{stage}.png")
        (out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    print(f"{out / 'scores.json'} has the scores, and the curves lie beside it.")


if __name__ == "__main__":
    typer.run(main)
