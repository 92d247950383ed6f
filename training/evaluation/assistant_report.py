"""Measure an assistant on tasks, here in the process, at a server, or from kept answers, and against another one."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from assistant.answering import Assistant
from assistant.checkpoint import LAYOUTS
from assistant.embeddings import tower_key, weight_files
from assistant.hashing import file_hash
from assistant.models import JOEY, ModelError, find_model, local_folder, read_json
from training.evaluation.captions import scorers
from training.evaluation.endpoint import Endpoint, EndpointSettings
from training.evaluation.in_process import InProcess
from training.evaluation.predictions import PredictionError, Stored, read_predictions
from training.evaluation.task_items import TaskItems, open_task
from training.evaluation.task_report import said_of_task, versions
from training.evaluation.task_run import (
    Predictor,
    TaskFindings,
    answer_task,
    findings_of,
    measures_of_both,
    require_complete,
)

JOEY_NAME = "joey"


@dataclass(frozen=True)
class Wanted:
    """What is asked and how; answers are kept beside the report `out`, one file a task."""

    tasks: tuple[str, ...]
    out: Path
    data: Path | None = None  # the folder of shards
    limit: int | None = None
    partial: bool = False
    batch: int = 16
    bf16: bool = False
    endpoint: EndpointSettings | None = None
    predictions: Path | None = None  # answers that are scored, and nobody is asked
    against: str | None = None  # another model, or the report or the answers of one


@dataclass(frozen=True)
class AssistantFindings:
    """The report, ready for JSON, and what it was made of, task by task: a page shows that."""

    report: dict[str, Any]
    tasks: tuple[TaskFindings, ...]


def kind_of_model(source: str | Path) -> tuple[str, bool]:
    """The model type that the configuration of `source` (a folder or a hub name) names, and whether it answers.

    Raises ModelError where there is no such folder, or no configuration in it.
    """
    folder = local_folder(source)
    if not (folder / "config.json").is_file():
        raise ModelError(f"the model folder {folder} lacks config.json; export or copy it again")
    kind = str(read_json(folder / "config.json").get("model_type"))
    return kind, kind in LAYOUTS


def predictions_file(report: Path, task: str) -> Path:
    """Where the answers to `task` lie that a `report` was made of."""
    return report.with_suffix(f".{task}.jsonl")


def examine_assistant(source: str | None, wanted: Wanted) -> AssistantFindings:
    """The scores of every task, and where `wanted.against` names another model, the differences.

    `source` is a folder or a hub name (Joey where None), or with an endpoint the name of a model there.

    Raises:
        TaskError, DataError: a task or its data are at fault; nothing was asked then.
        ModelError, EndpointError: the model cannot be had or asked any further; answers that came are kept.
        PredictionError: kept answers are of another run, or do not fit the task.
        IncompleteError: questions are not answered, and `wanted.partial` does not say that this is well.
        ImportError: captions are asked for, and the package `pycocoevalcap` is not installed.
    """
    asked = [open_task(name, wanted.data, wanted.limit) for name in wanted.tasks]
    if any(task.task.kind == "captions" for task in asked):
        scorers()  # before anything is asked: the package may be missing
    for kept in (wanted.predictions, wanted.against):
        if _is_file(kept, ".jsonl") and len(asked) != 1:
            raise PredictionError(f"{kept} holds answers to one task, and {len(asked)} are named")
    model, found = _first(source, wanted, asked)
    report: dict[str, Any] = {"model": model, "against": None, "tasks": [], "versions": versions()}
    others: list[Stored | None] = [None] * len(asked)
    if wanted.against is not None:
        report["against"], others = _second(wanted.against, wanted, asked)
    for findings, other in zip(found, others, strict=True):
        first = Stored(None, dict(findings.predictions), {})
        compared = measures_of_both(findings.asked, first, other) if other else []
        report["tasks"].append(said_of_task(findings, compared))
    return AssistantFindings(report, tuple(found))


def _first(source: str | None, wanted: Wanted, asked: list[TaskItems]) -> tuple[dict[str, Any], list[TaskFindings]]:
    if wanted.predictions is not None:
        stored = read_predictions(wanted.predictions, [item.id for item in asked[0].items])
        _check_task(wanted.predictions, stored, asked[0])
        said = {"source": str(wanted.predictions), "kind": "kept answers", **(stored.header or {}).get("model", {})}
        return said, [findings_of(asked[0], stored, wanted.partial)]
    said, header, predictor = _predictor(source, wanted)
    return said, list(_answered(asked, predictor, header, wanted))


def _answered(
    asked: list[TaskItems], predictor: Predictor, header: Mapping[str, Any], wanted: Wanted
) -> Iterator[TaskFindings]:
    for task in asked:
        file, started = predictions_file(wanted.out, task.name), time.perf_counter()
        stored, of_now = answer_task(task, predictor, file, header)
        findings = findings_of(task, stored, wanted.partial)
        yield replace(findings, of_now=of_now, seconds=time.perf_counter() - started)


def _predictor(source: str | None, wanted: Wanted) -> tuple[dict[str, Any], dict[str, Any], Predictor]:
    """What the report says of a model, what the heads of its answers say, and the model."""
    if wanted.endpoint is not None:
        endpoint = Endpoint(replace(wanted.endpoint, model=source))
        header = {"endpoint": wanted.endpoint.url, "name": endpoint.model}
        kind = "a model behind an OpenAI-compatible server"
        more = {"at_once": wanted.endpoint.at_once, "timeout": wanted.endpoint.timeout}
        return {"source": endpoint.model, "kind": kind, **header, **more}, header, endpoint
    folder = find_model(source)
    dtype = torch.bfloat16 if wanted.bf16 else torch.float32
    assistant = Assistant.load(source, dtype)
    header = {"weights": tower_key(folder), "dtype": str(dtype).removeprefix("torch.")}
    said = {
        "source": str(source or JOEY_NAME),
        "kind": read_json(folder / "config.json")["model_type"],
        "sha256": {file.name: file_hash(file) for file in weight_files(folder)},
        "device": str(assistant.model.device),
        "batch": wanted.batch,
        **header,
    }
    return said, header, InProcess(assistant, wanted.batch)


def _second(against: str, wanted: Wanted, asked: list[TaskItems]) -> tuple[dict[str, Any], list[Stored | None]]:
    """What is said of the other model, and its answers to each task."""
    if _is_file(against, ".json", ".jsonl"):
        stored: list[Stored | None] = []
        for task in asked:
            file = Path(against) if against.endswith(".jsonl") else predictions_file(Path(against), task.name)
            one = read_predictions(file, [item.id for item in task.items])
            _check_task(file, one, task)
            require_complete(task, one, wanted.partial)
            stored.append(one)
        return {"source": against, "kind": "kept answers"}, stored
    said, header, predictor = _predictor(against, replace(wanted, endpoint=None))
    out = wanted.out.with_name(f"{wanted.out.stem}.against-{name_of(against)}.json")
    others = [answer_task(task, predictor, predictions_file(out, task.name), header)[0] for task in asked]
    for task, other in zip(asked, others, strict=True):
        require_complete(task, other, wanted.partial)
    return said, list(others)


def name_of(source: str | None) -> str:
    """What files about the model `source` are called."""
    return JOEY_NAME if source is None or Path(source) == JOEY else Path(source).resolve().name


def _is_file(name: Path | str | None, *endings: str) -> bool:
    return name is not None and str(name).endswith(endings)


def _check_task(file: Path, stored: Stored, asked: TaskItems) -> None:
    """Raises PredictionError where the head of a file says that other questions were asked."""
    if stored.header is not None and stored.header.get("asked") != asked.sha256:
        raise PredictionError(
            f"{file} answers other questions than task {asked.name} asks now (its data, prompt or limit were others)"
        )
