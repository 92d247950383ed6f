"""The command that measures a model: an assistant on tasks, a vision tower on labelled pictures."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ui.commands import evaluating_options as options
from ui.commands.shared import fail, plain_errors, stopping, tell

if TYPE_CHECKING:
    from training.evaluation.assistant_report import Wanted as WantedOfAssistant
    from training.evaluation.measures import Wanted as WantedOfTower

PANEL = "Pretrain and measure"
commands = typer.Typer()


@commands.command(
    rich_help_panel=PANEL,
    epilog="Examples: kangaroo evaluate runs/joey/model --task scenes --page report.html   or   "
    "kangaroo evaluate runs/dino/model --train birds/train --test birds/test",
)
def evaluate(
    model: options.ModelArgument = None,
    task: options.TaskOption = None,
    against: options.AgainstOption = None,
    endpoint: options.EndpointOption = None,
    api_key_env: options.ApiKeyEnvOption = None,
    at_once: options.AtOnceOption = 8,
    timeout: options.TimeoutOption = 120.0,
    retries: options.RetriesOption = 5,
    predictions: options.PredictionsOption = None,
    partial: options.PartialOption = False,
    limit: options.LimitOption = None,
    train: options.TrainOption = None,
    test: options.TestOption = None,
    pairs: options.PairsOption = None,
    features: options.FeaturesOption = "pooled",
    neighbours: options.NeighboursOption = 20,
    shots: options.ShotsOption = None,
    templates: options.TemplatesOption = None,
    features_folder: options.FeaturesFolderOption = None,
    keep: options.KeepOption = True,
    data: options.DataOption = None,
    batch: options.BatchOption = None,
    bf16: options.Bf16Option = False,
    out: options.OutOption = None,
    page: options.PageOption = None,
) -> None:
    """Measure a model. An assistant: captions, questions, choices, yes or no, true or false, perplexity.

    A vision tower: kNN and linear probes, and with a text half naming without examples and retrieval.
    """
    for option, file in (("--out", out), ("--page", page)):
        if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
            raise fail(f"{option} {file}: name a file in a folder that exists")
    few = read_shots(shots) if shots is not None else ()
    asks = [
        name for name, given in (("--task", task), ("--endpoint", endpoint), ("--predictions", predictions)) if given
    ]
    if recognise(model, asks, [train, test, pairs], endpoint):
        from training.evaluation.assistant_report import Wanted, name_of
        from training.evaluation.endpoint import EndpointSettings

        server = None
        if endpoint:
            key = key_in(api_key_env)
            server = EndpointSettings(endpoint, key=key, at_once=at_once, timeout=timeout, retries=retries)
        name = (model or "endpoint").replace("/", "-") if endpoint else name_of(model)
        out = out or Path("evaluations") / f"{name}.json"
        tasks = tuple(task or (options.DEFAULT_TASK,))
        size = batch or options.ASSISTANT_BATCH
        asked = Wanted(tasks, out, data, limit, partial, size, bf16, server, predictions, against)
        measure_assistant(model, asked, page)
        return
    from training.data.pictures import DataError
    from training.evaluation.measures import Wanted as OfTower
    from training.evaluation.picture_data import read_templates

    with plain_errors(DataError):
        wording = read_templates(templates) if templates else ()
    wanted = OfTower(train, test, pairs, features, neighbours, batch or options.TOWER_BATCH, bf16, few, wording)
    measure_tower(model, wanted, data, features_folder, keep, out, page)


def recognise(model: str | None, asks: list[str], labelled: list[str | None], endpoint: str | None) -> bool:
    """Whether an assistant is measured, and not a tower; ends the command where model and options do not fit."""
    from assistant.models import ModelError
    from training.evaluation.assistant_report import kind_of_model

    if asks and any(labelled):
        raise fail(f"{asks[0]} asks an assistant, and --train, --test and --pairs measure a tower: do one at a time")
    if model is None or endpoint:
        return bool(asks)
    with plain_errors(ModelError):
        kind, answers = kind_of_model(model)
    if asks and not answers:
        raise fail(f"{model} is a tower ({kind}), which answers no questions: measure it with --train and --test")
    if answers and any(labelled):
        tell(f"{model} is an assistant ({kind}): its vision tower is measured")
        return False
    tell(f"{model} is {'an assistant' if answers else 'a tower'} ({kind})")
    return answers


def key_in(variable: str | None) -> str:
    """The key in the environment variable of that name; ends the command where it is not set."""
    if variable is None:
        return "none"
    if not os.environ.get(variable):
        raise fail(f"--api-key-env {variable}: there is no such environment variable, or nothing in it")
    return os.environ[variable]


def measure_assistant(model: str | None, wanted: "WantedOfAssistant", page: Path | None) -> None:
    """Ask, score and write the report; ends the command with one line where that cannot be done."""
    from rich.console import Console

    from assistant.models import ModelError
    from training.data.pictures import DataError
    from training.evaluation.assistant_report import examine_assistant
    from training.evaluation.endpoint import EndpointError
    from training.evaluation.predictions import PredictionError
    from training.evaluation.task import TaskError
    from training.evaluation.task_page import task_page
    from training.evaluation.task_report import difference_table, score_table
    from training.evaluation.task_run import IncompleteError

    kept = "The answers so far are kept: the same command goes on from there."
    errors = (ModelError, DataError, TaskError, EndpointError, PredictionError, IncompleteError, ImportError)
    with plain_errors(*errors), stopping(f"stopped. {kept}"):
        findings = examine_assistant(model, wanted)
    report = findings.report
    for task in report["tasks"]:
        for note in task["notes"]:
            tell(f"{task['task']}: {note}")
        Console().print(score_table(task))
        if task["compared"]:
            Console().print(difference_table(task, report["against"]["source"]))
    wanted.out.parent.mkdir(parents=True, exist_ok=True)
    wanted.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"see {wanted.out}")
    if page is not None:
        with plain_errors(DataError):
            text = task_page(report, findings.tasks)
        page.write_text(text, encoding="utf-8", errors="xmlcharrefreplace")
        print(f"see {page}")


def measure_tower(
    tower: str | None,
    wanted: "WantedOfTower",
    data: Path | None,
    features_folder: Path | None,
    keep: bool,
    out: Path | None,
    page: Path | None,
) -> None:
    """Measure a tower and write what is asked for; ends the command with one line where that cannot be done."""
    from rich.console import Console

    from assistant.models import EMBEDDER, JOEY, ModelError
    from training.data.pictures import DataError
    from training.evaluation.feature_store import default_folder
    from training.evaluation.tower_page import tower_page
    from training.evaluation.tower_report import examine_tower, report_table, said_of_reuse

    kept = (features_folder or default_folder()) if keep else None
    goes_on = " The features so far are kept: the same command goes on from there." if keep else ""
    with plain_errors(ModelError, DataError), stopping("stopped." + goes_on):
        findings = examine_tower(tower or JOEY / EMBEDDER, wanted, data, kept)
    for line in (*findings.report["notes"], *said_of_reuse(findings.report)):
        tell(line)
    Console().print(report_table(findings.report))
    if out is not None:
        out.write_text(json.dumps(findings.report, indent=2) + "\n")
    if page is not None:
        page.write_text(tower_page(findings), encoding="utf-8", errors="xmlcharrefreplace")
        print(f"see {page}")


def read_shots(given: str) -> tuple[int, ...]:
    """The numbers in `1,5,10`, rising; ends the command where they are none."""
    try:
        shots = sorted({int(number) for number in given.split(",")})
    except ValueError:
        shots = [0]
    if shots[0] < 1:
        raise fail(f"--shots {given}: numbers of pictures with commas between them. Example: --shots 1,5,10")
    return tuple(shots)
