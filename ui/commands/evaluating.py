"""The command that measures a model: an assistant on tasks, a vision tower on labelled pictures."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ui.commands.shared import fail, plain_errors, stopping, tell

if TYPE_CHECKING:
    from training.evaluation.assistant_report import Wanted as WantedOfAssistant
    from training.evaluation.measures import Wanted as WantedOfTower

PANEL = "Pretrain and measure"
ASSISTANTS, TOWERS, BOTH = "An assistant", "A vision tower", "Both"
DEFAULT_TASK = "scenes"  # needs no data
TOWER_BATCH, ASSISTANT_BATCH = 64, 16
commands = typer.Typer()


@commands.command(
    rich_help_panel=PANEL,
    epilog="Examples: kangaroo evaluate runs/joey/model --task scenes --page report.html   or   "
    "kangaroo evaluate runs/dino/model --train birds/train --test birds/test",
)
def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A folder or hub name (organisation/name) of an assistant or a tower, told apart by its "
            "configuration; with --endpoint a model's name there.",
            show_default="Joey, or Joey's embedder",
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="A shipped task (scenes, flickr8k-captions, coco-yes-no, visual7w-choices, daquar-words, "
            "nlvr-true-false, text-perplexity) or a .yaml file; again for more.",
            show_default=DEFAULT_TASK,
            rich_help_panel=ASSISTANTS,
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="OTHER",
            help="Compare with another model on the same questions: its folder, or the .json of an earlier report.",
            rich_help_panel=ASSISTANTS,
        ),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Ask an OpenAI-compatible server. Example: http://localhost:8000/v1",
            rich_help_panel=ASSISTANTS,
        ),
    ] = None,
    api_key_env: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The environment variable with the server's key.", rich_help_panel=ASSISTANTS
        ),
    ] = None,
    at_once: Annotated[
        int, typer.Option(min=1, max=256, help="Questions on the way to the server.", rich_help_panel=ASSISTANTS)
    ] = 8,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds that the server has for an answer.", rich_help_panel=ASSISTANTS)
    ] = 120.0,
    retries: Annotated[
        int,
        typer.Option(
            min=0, max=20, help="Tries after a failure that may pass, later and later.", rich_help_panel=ASSISTANTS
        ),
    ] = 5,
    predictions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Score the answers in this file, and ask nobody.", rich_help_panel=ASSISTANTS
        ),
    ] = None,
    partial: Annotated[
        bool,
        typer.Option("--partial", help="Score what is answered, where not all is.", rich_help_panel=ASSISTANTS),
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="At most so many pictures (or texts) of a task.", rich_help_panel=ASSISTANTS),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Labelled pictures to learn from: a folder of labels' folders, or a shard.",
            rich_help_panel=TOWERS,
        ),
    ] = None,
    test: Annotated[
        str | None, typer.Option(metavar="DATA", help="Labelled pictures to name.", rich_help_panel=TOWERS)
    ] = None,
    pairs: Annotated[
        str | None,
        typer.Option(
            metavar="DATA", help="Pictures with captions: a .jsonl or .csv file, or a shard.", rich_help_panel=TOWERS
        ),
    ] = None,
    features: Annotated[
        Literal["pooled", "patches", "both"],
        typer.Option(help="What probes read; patches is the mean over them.", rich_help_panel=TOWERS),
    ] = "pooled",
    neighbours: Annotated[
        int, typer.Option(min=1, help="How many neighbours vote in kNN.", rich_help_panel=TOWERS)
    ] = 20,
    shots: Annotated[
        str | None,
        typer.Option(
            help="Probe with so few pictures of each label too, drawn five times. Example: 1,5,10",
            rich_help_panel=TOWERS,
        ),
    ] = None,
    templates: Annotated[
        Path | None,
        typer.Option(
            help="Wordings for zero-shot beside the usual ones: a file, one a line, {} where the label goes.",
            rich_help_panel=TOWERS,
        ),
    ] = None,
    features_folder: Annotated[
        Path | None,
        typer.Option(
            envvar="KANGAROO_FEATURES",
            help="Where features are kept, so that the same pictures never go through the same tower twice.",
            show_default="~/.cache/kangaroo/features",
            rich_help_panel=TOWERS,
        ),
    ] = None,
    keep: Annotated[
        bool,
        typer.Option("--keep/--no-keep", help="Keep features, and use those that were kept.", rich_help_panel=TOWERS),
    ] = True,
    data: Annotated[
        Path | None,
        typer.Option(
            envvar="KANGAROO_DATA", help="The folder of the Parquet shards that are named.", rich_help_panel=BOTH
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Pictures, or questions, at once.",
            show_default=f"{TOWER_BATCH}, or {ASSISTANT_BATCH} questions",
            rich_help_panel=BOTH,
        ),
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Run the model in bfloat16.", rich_help_panel=BOTH)] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the report into this file, as JSON; an assistant's answers are kept beside it.",
            show_default="evaluations/MODEL.json for an assistant",
            rich_help_panel=BOTH,
        ),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(
            help="Write a page for the browser into this file: pictures, answers, errors.", rich_help_panel=BOTH
        ),
    ] = None,
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
        tasks = tuple(task or (DEFAULT_TASK,))
        size = batch or ASSISTANT_BATCH
        asked = Wanted(tasks, out, data, limit, partial, size, bf16, server, predictions, against)
        measure_assistant(model, asked, page)
        return
    from training.data.pictures import DataError
    from training.evaluation.measures import Wanted as OfTower
    from training.evaluation.picture_data import read_templates

    with plain_errors(DataError):
        wording = read_templates(templates) if templates else ()
    wanted = OfTower(train, test, pairs, features, neighbours, batch or TOWER_BATCH, bf16, few, wording)
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
