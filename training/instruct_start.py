"""Build the objective of an instruct stage: the model it starts from, what trains of it, and how it is held."""

from collections.abc import Callable
from pathlib import Path

import torch

from assistant.checkpoint import load_llava
from assistant.exporting import require_unquantised
from assistant.fusion import join, replace_tower, squeeze_pictures, with_tiles
from assistant.language_models import load_language_model
from assistant.models import ModelError, find_model
from assistant.projectors import Llava
from assistant.tiles import Processor, grids_of, is_tiled
from assistant.towers import load_tower
from training.adapters import Adapter, add_lora
from training.arguments import has_fast_bf16
from training.config import InstructStage, RecipeError
from training.feature_cache import FeatureCache
from training.objectives.instruct import InstructObjective
from training.quantised import load_quantised

FEATURE_MEMORY = 2.0  # GiB


def build_instruct_objective(stage: InstructStage, named: Callable[[str], str | Path]) -> InstructObjective:
    """What `stage` trains. `named` finds what an earlier stage made, and leaves folders and hub names as they are.

    Raises RecipeError where a model cannot be had or does not fit what the stage says of it.
    """
    try:
        model, processor = _joined(stage, named) if stage.start_from is None else _loaded(stage, named)
        adapter = _adapter(stage, model, named)
    except (ModelError, ValueError) as error:
        raise RecipeError(f"stage {stage.name}: {error}") from error
    if stage.attention is not None:
        model.set_attn_implementation(stage.attention)
    _check_window(stage, model)
    objective = InstructObjective(
        model,
        processor,
        stage.trains,
        stage.longest,
        stage.length_power,
        stage.rates,
        adapter,
        packs(stage),
        _feature_cache(stage),
    )
    hold_still(objective, stage)
    return objective


def packs(stage: InstructStage) -> bool:
    """Whether lessons lie in one row: as the stage says, else where it leaves the attention to us."""
    if stage.packing is not None:
        return stage.packing
    return stage.attention is None and not stage.schedule.compile  # each new length of a row would be compiled anew


def hold_still(objective: InstructObjective, stage: InstructStage) -> None:
    """Hold what does not train as `still` says. Mixed precision makes bfloat16 of it in every product anyway."""
    if stage.still == "float32" or not _is_mixed(stage):
        return
    trained = objective.trained_parameters()
    for name, parameter in objective.named_parameters():
        if name not in trained and parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)


def _is_mixed(stage: InstructStage) -> bool:
    return has_fast_bf16() if stage.schedule.bf16 is None else stage.schedule.bf16


def _joined(stage: InstructStage, named: Callable[[str], str | Path]) -> tuple[Llava, Processor]:
    tower = load_tower(named(str(stage.tower)))
    language_model, tokenizer = load_language_model(named(str(stage.language_model)))
    return join(tower.model, language_model, tokenizer, tower.image_processor, stage.projector, stage.tiles)


def _loaded(stage: InstructStage, named: Callable[[str], str | Path]) -> tuple[Llava, Processor]:
    folder = find_model(named(str(stage.start_from)))
    require_unquantised(folder, "taught")
    if stage.four_bits:
        model, processor = load_quantised(folder, torch.bfloat16 if _is_mixed(stage) else torch.float32)
    else:
        model, processor = load_llava(folder)
    squeeze_pictures(model, processor)
    if stage.tower is not None:
        replace_tower(model, load_tower(named(stage.tower)).model)
    if not stage.tiles or (is_tiled(processor) and tuple(grids_of(processor)) == stage.tiles):
        return model, processor
    return with_tiles(model, processor, stage.tiles)


def _adapter(stage: InstructStage, model: Llava, named: Callable[[str], str | Path]) -> Adapter | None:
    if stage.lora is None:
        return None
    source = named(str(stage.start_from))
    name = str(Path(source).absolute()) if Path(source).is_dir() else str(source)
    return add_lora(model, stage.lora, find_model(source), name)


def _feature_cache(stage: InstructStage) -> FeatureCache | None:
    """Where the tower stands still and no picture is cropped or mirrored by chance, each is seen by it once."""
    as_they_are = not stage.mixture and not stage.replay
    memory = stage.feature_memory if stage.feature_memory is not None else FEATURE_MEMORY * as_they_are
    return FeatureCache(int(memory * 2**30)) if memory and "tower" not in stage.trains else None


def _check_window(stage: InstructStage, model: Llava) -> None:
    """Our masks let a token see all before it; a model that looks back less far would learn what it cannot use."""
    text = model.config.text_config
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    if window is not None and stage.longest > window:
        raise RecipeError(
            f"stage {stage.name}: the language model looks back {window} tokens and longest is {stage.longest}; "
            f"say longest: {window}"
        )
