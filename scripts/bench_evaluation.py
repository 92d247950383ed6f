"""Time one task through vLLM and here in the process with transformers, with the same scores.

Example, on a quiet machine: python scripts/bench_evaluation.py --limit 100 --threads 2 --rounds 5 --out evaluation.json
"""

import json
import os
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import torch
import typer

from assistant.answering import Assistant
from assistant.models import find_model
from scripts.bench_pretraining import machine
from scripts.benchmarks.measuring import Disagreement
from serving.engine import LocalEngine
from training.evaluation.endpoint import Endpoint, EndpointSettings
from training.evaluation.in_process import InProcess
from training.evaluation.task_items import TaskItems, open_task
from training.evaluation.task_report import said_of_score
from training.evaluation.task_run import Predictor, TaskFindings, answer_task, findings_of

SECONDS_TO_START = 400.0
WARM_UP = 16  # questions that are asked before the clock runs, and are none of those that count
# In float32 only the order of additions differs. In bfloat16 two candidates may be so near that roundings choose.
SAME_SCORE = {"float32": 1e-6, "bfloat16": 0.03}


@dataclass(frozen=True)
class Timed:
    """What one way took for all questions, and what came out."""

    seconds: float
    questions: int
    findings: TaskFindings

    @property
    def rate(self) -> float:
        """Questions a second."""
        return self.questions / self.seconds


def parts_of(asked: TaskItems, rounds: int) -> list[TaskItems]:
    """The questions behind those for warming up in `rounds` parts: vLLM keeps prompts, and none is to come twice."""
    items = asked.items[WARM_UP:]
    edges = [round(len(items) * number / rounds) for number in range(rounds + 1)]
    return [replace(asked, items=items[start:end], left_out=0) for start, end in pairwise(edges)]


def timed(asked: TaskItems, predictor: Predictor, file: Path) -> Timed:
    """Ask all of `asked` by the clock; the answers go to `file`."""
    start = time.perf_counter()
    stored, count = answer_task(asked, predictor, file, {})
    seconds = time.perf_counter() - start
    return Timed(seconds, count, findings_of(asked, stored, partial=False))


def scores_of(findings: TaskFindings) -> dict[str, float | None]:
    """The score of all questions by name."""
    told = (said_of_score(measure) for measure in findings.measures)
    return {score["score"]: score["value"] for score in told if score["of"] is None}


def require_same(found: dict[str, Timed], dtype: str) -> dict[str, float]:
    """The share of equal answers beside the first way's. Raises Disagreement where a score is another one."""
    (first, ours), *others = found.items()
    alike = {}
    for name, other in others:
        mine, theirs = ours.findings.predictions, other.findings.predictions
        alike[name] = sum(mine[id].answer == theirs[id].answer for id in mine) / len(mine)
        for score, value in scores_of(ours.findings).items():
            value_there = scores_of(other.findings)[score]
            if abs((value or 0.0) - (value_there or 0.0)) > SAME_SCORE[dtype]:
                raise Disagreement(f"{score}: {value} {first}, {value_there} {name}")
    return alike


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str | None, typer.Argument(help="A model folder.", show_default="Joey")] = None,
    task: Annotated[str, typer.Option(help="A task whose answers are generated.")] = "scenes",
    data: Annotated[Path | None, typer.Option(envvar="KANGAROO_DATA", help="The folder of shards.")] = None,
    limit: Annotated[int, typer.Option(min=10, help="Pictures that are asked about.")] = 100,
    at_once: Annotated[int, typer.Option(min=1, help="Questions on the way to vLLM.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="Threads of transformers.")] = os.cpu_count() or 1,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Arithmetic of all.")] = "bfloat16",
    rounds: Annotated[int, typer.Option(min=1, help="Parts of the questions; the ways take turns.")] = 1,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="Also write all figures there, as JSON.")] = None,
) -> None:
    """Ask the same questions through vLLM, several at once, and with transformers' generate, alone and in batches.

    No way runs beside another. Pictures are decoded once, before the clock runs; vLLM gets each as PNG over HTTP.
    """
    torch.set_num_threads(threads)
    asked = open_task(task, data, limit)
    for place in range(len(asked.pictures)):
        asked.pictures[place]
    assistant = Assistant.load(model, getattr(torch, dtype))
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalEngine(find_model(model), "measured", dtype=dtype) as engine,
    ):
        engine.wait_until_ready(SECONDS_TO_START)
        settings = EndpointSettings(f"{engine.base_url}/v1", key=str(engine.api_key), at_once=at_once)
        ways: dict[str, Predictor] = {
            "transformers, one at a time": InProcess(assistant, 1),
            f"transformers, {at_once} at once": InProcess(assistant, at_once),
            f"vLLM, {at_once} at once": Endpoint(settings),
        }
        for way in ways.values():
            way.predict(asked, asked.items[:WARM_UP], lambda prediction: None)
        found: dict[str, list[Timed]] = {name: [] for name in ways}
        for number, part in enumerate(parts_of(asked, rounds)):
            for place, (name, way) in enumerate(ways.items()):
                found[name].append(timed(part, way, Path(folder) / f"{number}-{place}.jsonl"))
    try:
        alike = [require_same({name: ones[part] for name, ones in found.items()}, dtype) for part in range(rounds)]
    except Disagreement as error:
        raise typer.BadParameter(str(error), param_hint="this comparison") from error
    report = told(found, alike) | {"task": task, "dtype": dtype, "machine": machine(torch.device("cpu"))}
    if out is not None:
        out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def told(found: dict[str, list[Timed]], alike: list[dict[str, float]]) -> dict[str, Any]:
    """Prints a line for each way, and gives all of it for JSON: medians over the parts, and the ratios of each."""
    slowest = next(iter(found.values()))
    report: dict[str, Any] = {}
    for name, ones in found.items():
        ratios = sorted(one.rate / first.rate for one, first in zip(ones, slowest, strict=True))
        same = [part.get(name, 1.0) for part in alike]
        scores = [scores_of(one.findings) for one in ones]
        report[name] = {
            "questions": [one.questions for one in ones],
            "questions_a_second": [one.rate for one in ones],
            "times_as_fast": ratios,
            "answers_alike": same,
            "scores": scores,
        }
        typer.echo(
            f"{name}: {median(one.rate for one in ones):.2f} questions a second, {median(ratios):.2f} x "
            f"({ratios[0]:.2f}-{ratios[-1]:.2f}), at least {min(same):.1%} of the answers alike; "
            f"of the first part {scores[0]}"
        )
    return {"ways": report}


if __name__ == "__main__":
    app()
