"""Run the stages of a recipe in order, each once, each going on where it stopped."""

import hashlib
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from assistant.checkpoint import convert_weights, copy_model, keep_embedder
from assistant.hashing import file_hash
from assistant.models import EMBEDDER, JOEY, find_model
from training.after_tuning import run_after_tuning
from training.config import (
    ConversationSource,
    InstructStage,
    LanguageStage,
    PictureSource,
    Recipe,
    RecipeError,
    Stage,
    TokenizerStage,
    TowerStage,
)
from training.data.pictures import shard_files
from training.data.sources import name_and_stamp
from training.lesson_sets import open_conversations
from training.preference_sets import read_rows_of
from training.preference_stages import PairStage, PreferenceStage, ReinforceStage
from training.reporting import require_reporter
from training.stages import Workshop, run_instruct, run_language, run_tokenizer, run_tower

DONE = "done.json"


def run_recipe(recipe: Recipe, data: Path | None, runs: Path, only: str | None = None) -> Path:
    """Run `recipe` in the folder `runs`/NAME and return the folder of the finished model.

    A finished stage is not run again unless what the recipe says of it changed; a stage that was stopped goes on from
    its newest checkpoint. `only` runs one stage by name, on what its predecessors left.
    Raises RecipeError or DataError before the first step when recipe or data are at fault.
    """
    # With torchrun or accelerate launch this process is one of several; on its own it is the main one.
    state = PartialState(cpu=not torch.cuda.is_available())
    workshop = Workshop(runs / recipe.name, data)
    stages = [stage for stage in recipe.stages if only in (None, stage.name)]
    if not stages:
        raise RecipeError(f"there is no stage {only!r}; the stages are {', '.join(s.name for s in recipe.stages)}")
    check_data(recipe, workshop)
    for number, stage in enumerate(stages, start=1):
        state.print(f"[{number}/{len(stages)}] {stage.name}: {type(stage).__doc__}", flush=True)
        run_stage(stage, workshop)
    if only:
        return workshop.runs / only / "output"
    if state.is_main_process:
        publish(recipe, workshop)
    state.wait_for_everyone()
    return workshop.runs / "model"


def run_stage(stage: Stage, workshop: Workshop) -> None:
    """Run `stage` unless it is finished already; leave its scores and its settings behind."""
    marker = workshop.runs / stage.name / DONE
    settings = stage.model_dump(mode="json")
    if marker.is_file() and _says_the_same(json.loads(marker.read_text())["settings"], settings):
        PartialState().print(f"    finished before, see {marker}", flush=True)
        return
    started = time.time()
    scores = _run(stage, workshop)
    if PartialState().is_main_process:
        _finish(marker, settings, scores, started)
    PartialState().wait_for_everyone()


def _says_the_same(before: Any, now: Any) -> bool:
    """Whether a finished stage would be trained the same way now.

    A field that did not exist when it finished does not count, nor does what only tells people how a run goes.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        counts = before.keys() - {"monitor", "report_to"}
        return counts <= now.keys() and all(_says_the_same(before[field], now[field]) for field in counts)
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(map(_says_the_same, before, now))
    return bool(before == now)


def _finish(marker: Path, settings: dict[str, Any], scores: dict[str, float], started: float) -> None:
    summary = {"settings": settings, "scores": scores, "seconds": round(time.time() - started)}
    partial = marker.with_suffix(".partial")
    partial.write_text(json.dumps(summary, indent=2))
    partial.replace(marker)
    print(f"    {json.dumps(scores)}", flush=True)


def _run(stage: Stage, workshop: Workshop) -> dict[str, float]:
    match stage:
        case TokenizerStage():
            return run_tokenizer(stage, workshop)
        case TowerStage():
            return run_tower(stage, workshop)
        case LanguageStage():
            return run_language(stage, workshop)
        case InstructStage():
            return run_instruct(stage, workshop)
        case _:
            return run_after_tuning(stage, workshop)


def publish(recipe: Recipe, workshop: Workshop) -> None:
    """Put the finished model (a LLaVA or a tower), its embedder and their provenance into the folder `model`."""
    folder = workshop.runs / "model"
    copy_model(workshop.output(recipe.publish), folder)
    if recipe.embedder is not None:
        copy_model(workshop.output(recipe.embedder), folder / EMBEDDER)
        convert_weights(folder / EMBEDDER, recipe.dtype)
    elif (base := model_taught(recipe, workshop)) is not None:
        keep_embedder(base, folder)
    convert_weights(folder, recipe.dtype)
    (folder / "provenance.json").write_text(json.dumps(provenance(recipe, workshop), indent=2) + "\n")


def model_taught(recipe: Recipe, workshop: Workshop) -> Path | None:
    """The folder of the finished LLaVA that the published one goes on from; None where it was joined anew."""
    stages = {stage.name: stage for stage in recipe.stages}
    stage = stages[recipe.publish]
    while isinstance(stage, InstructStage | PreferenceStage | ReinforceStage):
        if stage.start_from is None:
            return None if isinstance(stage, InstructStage) else JOEY
        if stage.start_from not in stages:
            return find_model(workshop.named(stage.start_from))
        stage = stages[stage.start_from]
    return None


def provenance(recipe: Recipe, workshop: Workshop) -> dict[str, Any]:
    """The whole recipe, the hashes of the data it read, the versions it ran on, and what each stage scored."""
    done = {stage.name: json.loads((workshop.runs / stage.name / DONE).read_text()) for stage in recipe.stages}
    return {
        "recipe": recipe.model_dump(mode="json"),
        "data": data_hashes(recipe, workshop),
        "versions": {package: version(package) for package in ("torch", "transformers", "sentencepiece")},
        "stages": {name: {"scores": d["scores"], "seconds": d["seconds"]} for name, d in done.items()},
        "parent": None,
    }


def check_data(recipe: Recipe, workshop: Workshop) -> None:
    """Raises DataError when pictures or texts that `recipe` names are not there; better now than after an hour.

    Raises RecipeError when a package is missing that it reports to.
    """
    for stage in recipe.stages:
        if not isinstance(stage, TokenizerStage):
            require_reporter(stage.schedule.report_to)
    _files(recipe, workshop)
    for source in _other_sources(recipe):
        name_and_stamp(source, workshop.data_folder)
    for talk in _conversations(recipe):
        open_conversations(talk, workshop.data_folder)
    for pairs in _pairs(recipe):
        read_rows_of(pairs, workshop.data_folder)


def data_hashes(recipe: Recipe, workshop: Workshop) -> dict[str, str]:
    """sha256 of each shard; of other sources, of the names, sizes and times of their files."""
    hashes = {file.name: file_hash(file) for file in _files(recipe, workshop)}
    for source in _other_sources(recipe):
        name, stamp = name_and_stamp(source, workshop.data_folder)
        hashes[name] = hashlib.sha256(stamp.encode()).hexdigest()
    for talk in _conversations(recipe):
        records = open_conversations(talk, workshop.data_folder).records
        hashes[f"conversations {talk.conversations}"] = hashlib.sha256(records.stamp().encode()).hexdigest()
    for pairs in _pairs(recipe):
        stamp = read_rows_of(pairs, workshop.data_folder).records.stamp()
        hashes[f"pairs {pairs.conversations}"] = hashlib.sha256(stamp.encode()).hexdigest()
    return hashes


def _conversations(recipe: Recipe) -> list[ConversationSource]:
    stages = [stage for stage in recipe.stages if isinstance(stage, InstructStage)]
    return [source for stage in stages for source in (*stage.conversations, *stage.held_out_conversations)]


def _pairs(recipe: Recipe) -> list[ConversationSource]:
    stages = [stage for stage in recipe.stages if isinstance(stage, PairStage)]
    return [source for stage in stages for source in (*stage.pairs, *stage.held_out_pairs)]


def _other_sources(recipe: Recipe) -> list[PictureSource]:
    sources = [
        source
        for stage in recipe.stages
        for field in ("mixture", "held_out", "replay")
        for source in getattr(stage, field, ())
    ]
    sources += _monitored(recipe)
    return [source for source in sources if source.shard is None and source.scenes is None]


def _monitored(recipe: Recipe) -> list[PictureSource]:
    monitors = [stage.monitor for stage in recipe.stages if isinstance(stage, TowerStage) and stage.monitor is not None]
    return [source for monitor in monitors for source in (monitor.labelled, monitor.pairs) if source is not None]


def _files(recipe: Recipe, workshop: Workshop) -> list[Path]:
    shards = set()
    for stage in recipe.stages:
        for field in ("mixture", "held_out", "texts", "replay"):
            shards |= {source.shard for source in getattr(stage, field, ()) if source.shard}
        shards |= set(getattr(stage, "exclude_captions_of", ()))
    shards |= {source.shard for source in _monitored(recipe) if source.shard}
    return [file for shard in sorted(shards) for file in shard_files(workshop.data_folder(), shard)]
