"""Read runs from the folders that stages leave: size, samples, held-out loss and FLOPs, of one task only."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from training.config import LanguageStage, RecipeError, Stage, TokenizerStage, TowerStage, check_settings
from training.data.pictures import DataError
from training.objective import Objective, WholeBatchObjective
from training.planning.costs import tokens_of
from training.planning.passes import passes_of, training_flops
from training.planning.runs import COLUMNS, Run, Runs, positive, rows_of
from training.planning.subjects import Subjects
from training.recipe import DONE
from training.stages import Workshop
from training.strict import faults_in

# What may differ between runs of one law: how large, how long and how fast, and what changes no number.
SHAPE = {"width", "layers", "heads", "drop_path", "layer_scale"}
HOW = {"name", "schedule", "layer_decay", "attention", "monitor", "memory", "cache", "damaged"}
OF_LANGUAGE = {"width", "layers", "heads", "feed_forward", "longest"}


def read_runs(paths: Sequence[Path]) -> Runs:
    """The runs of `paths`: finished stages' folders, folders of those, and .csv files.

    Raises DataError naming the file, line or field where one cannot be read, is no finished run, or was trained on
    another task than the others.
    """
    folders = [folder for path in paths if not path.is_file() for folder in _stage_folders(path)]
    finished = [_Finished(folder) for folder in dict.fromkeys(folders)]
    _refuse_different_tasks(finished)
    told = [run for path in paths if path.is_file() for run in rows_of(path)]
    told += [one.run() for one in finished]
    units = {unit for _, unit in told}
    if len(units) != 1:
        raise DataError("some runs count samples and some tokens: plan them apart" if units else "there are no runs")
    return Runs(tuple(run for run, _ in told), units.pop())


def _stage_folders(path: Path) -> list[Path]:
    """`path` where it is a finished stage, or those of its folders that are and train a model."""
    if (path / DONE).is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: there is no such file or folder")
    inside = sorted(marker.parent for marker in path.glob(f"*/{DONE}"))
    trained = [folder for folder in inside if not isinstance(_settings(folder), TokenizerStage)]
    if not trained:
        raise DataError(
            f"{path} holds no finished stage: {DONE} is written when a stage ends. Name a stage's folder, such as "
            "runs/dino/dino, or let `kangaroo train` finish it"
        )
    return trained


def _said(folder: Path) -> dict[str, Any]:
    """What the marker of a finished stage says. Raises DataError where it is damaged."""
    file = folder / DONE
    try:
        said = json.loads(file.read_text())
        return {"settings": dict(said["settings"]), "scores": dict(said["scores"])}
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file} is damaged: {error}") from error


def _settings(folder: Path) -> Stage:
    """The stage in `folder`, with no data: a marker says fields of data that a recipe may not say."""
    said = _said(folder)["settings"]
    said |= {field: [{"scenes": 1, "weight": 1}] for field in ("mixture", "texts", "held_out") if said.get(field)}
    said |= {field: None for field in ("monitor",) if field in said}
    said |= {field: [] for field in ("replay", "phases", "conversations", "held_out_conversations") if field in said}
    try:
        return TypeAdapter[Stage](Stage).validate_python(said)
    except ValidationError as error:
        faults = faults_in(error, "the stage")
        raise DataError(f"{folder / DONE}: its settings are of another version: {faults}") from error


class _Finished:
    """One finished stage. Raises DataError for one whose loss says nothing of size and data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        stage = _settings(folder)
        if not isinstance(stage, TowerStage | LanguageStage):
            raise DataError(
                f"{folder} is a stage of kind {stage.kind}: a law is fitted to towers and language models that start "
                f"from nothing. If you know that its runs belong together, write a .csv with columns {COLUMNS}"
            )
        if isinstance(stage, TowerStage) and stage.start_from is not None:
            raise DataError(
                f"{folder} went on from {stage.start_from}: its own samples are not all that it learned from. Take "
                "runs that start from nothing"
            )
        self.stage = stage
        self.samples_a_step = _samples_a_step(folder, stage)
        self.objective = self._objective()

    def _objective(self) -> Objective:
        try:
            return Subjects(Workshop(self.folder.parent, None)).objective(self.stage)
        except RecipeError as error:
            raise DataError(f"{self.folder}: {error}") from error

    def run(self) -> tuple[Run, str]:
        """What it was, and its unit."""
        loss = positive(_said(self.folder)["scores"].get("eval_loss"), f"{self.folder / DONE}, eval_loss")
        samples = float(self.stage.schedule.steps * self.samples_a_step)
        tokens = tokens_of(self.stage)
        flops = training_flops(passes_of(self.objective, tokens or None)) * samples
        parameters = float(exported_parameters(self.folder / "output"))
        name = f"{self.folder.parent.name}/{self.folder.name}"
        return Run(name, parameters, samples * max(1, tokens), loss, flops), "tokens" if tokens else "samples"

    def task(self) -> dict[str, Any]:
        """All that decides what a loss means, by dotted names."""
        said = _said(self.folder)["settings"]
        if isinstance(self.stage, LanguageStage):
            return {name: value for name, value in _flat(said, "") if name not in OF_LANGUAGE}
        said["settings"] = check_settings(self.stage.objective, self.stage.settings).model_dump(mode="json")
        task = dict(_flat(said, ""))
        if isinstance(self.objective, WholeBatchObjective):
            task["samples of a step"] = self.samples_a_step  # they are what it tells apart
        return task


def _samples_a_step(folder: Path, stage: TowerStage | LanguageStage) -> int:
    """Samples of one step over all processes: the line that ends a run says how many samples came in a step."""
    log = folder / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    ends = [line for line in lines if line.get("train_steps_per_second") and "train_samples_per_second" in line]
    own = stage.schedule.batch_size * stage.schedule.accumulation
    if not ends:
        raise DataError(f"{log} lacks the line that ends a run, so that nothing says how many processes trained it")
    ratio = ends[-1]["train_samples_per_second"] / ends[-1]["train_steps_per_second"]
    return own * max(1, round(ratio / own))


def exported_parameters(output: Path) -> int:
    """How many numbers the checkpoint in `output` holds. Raises DataError where there is none, or it is damaged."""
    files = sorted(output.glob("*.safetensors"))
    if not files:
        raise DataError(f"{output} holds no weights (.safetensors); were they moved or deleted?")
    count = 0
    for file in files:
        try:
            with safe_open(file, framework="numpy") as weights:
                count += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise DataError(f"{file} is damaged: {error}") from error
    return count


def _refuse_different_tasks(finished: Sequence[_Finished]) -> None:
    """Raises DataError where two stages' losses do not lie on one curve: another objective, other data.

    A field that one of them does not have is of another version of ours, and does not count.
    """
    for one in finished[1:]:
        task, first = one.task(), finished[0].task()
        different = sorted(field for field in task.keys() & first.keys() if task[field] != first[field])
        if different:
            field = "objective" if "objective" in different else different[0]
            raise DataError(
                f"{finished[0].folder} and {one.folder} are not of one task: {field} is {first[field]} in the one and "
                f"{task[field]} in the other. Losses of different tasks lie on different curves: plan them apart"
            )


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """What is inside `value` by dotted names, without what may differ."""
    if isinstance(value, dict):
        for key, inner in value.items():
            is_shape = (name == "backbone" and key in SHAPE) or (name == "text" and key == "layers")
            if key not in HOW and not is_shape:
                yield from _flat(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        yield f"number of {name}", len(value)
        for place, inner in enumerate(value):
            yield from _flat(inner, f"{name}.{place}")
    else:
        yield name, value
