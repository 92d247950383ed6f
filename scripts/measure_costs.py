"""Measure what small real steps keep for the way back, and set it beside the formulas of `kangaroo plan --recipe`.

    python scripts/measure_costs.py

Each objective runs on this machine's CPU with a small tower: autograd calls a hook with every tensor that one step's
forward keeps. Nothing measured comes from the formulas that it is compared with.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoTokenizer, set_seed

from assistant.checkpoint import load_llava
from assistant.models import JOEY
from training.config import LanguageStage, TowerStage
from training.data.samples import Mixture, SceneLessons, Views
from training.objective import Objective, WholeBatchObjective
from training.objectives.instruct import InstructObjective
from training.objectives.language import LanguageObjective
from training.planning.activations import kept_by
from training.planning.costs import weights_of
from training.planning.losses import Batch, loss_costs
from training.planning.passes import passes_of
from training.stages import Workshop, build_tower_objective, new_language_model, opened
from training.trainer import freeze_all_but

VIT = {"width": 96, "layers": 4, "heads": 4, "patch": 8, "image_side": 64}
CROPS = {"small_side": 32, "small_count": 2, "prototypes": 512, "head_hidden": 128, "bottleneck": 32}
# What each objective is measured with: its settings and a backbone.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip": ({"start_temperature": 14.3}, {"family": "clip", **VIT}),
    "siglip": ({"start_temperature": 10, "start_bias": -10}, {"family": "siglip", **VIT}),
    "words": ({"start_temperature": 10, "start_bias": -10}, {"family": "siglip", **VIT}),
    "simclr": ({"head_hidden": 128, "projection": 32}, {"family": "vit", **VIT}),
    "moco": ({"head_hidden": 128, "projection": 32}, {"family": "vit", **VIT}),
    "mae": ({"decoder_width": 64, "decoder_layers": 2, "decoder_heads": 4}, {"family": "vit", **VIT}),
    "dino": (CROPS, {"family": "vit", **VIT}),
    "dinov2": (CROPS, {"family": "dinov2", "layer_scale": 0.1, **VIT}),
}
READS = ("clip", "siglip", "words")


def stage_of(name: str, **changes: Any) -> TowerStage:
    """A small stage of the objective called `name` on generated scenes."""
    settings, backbone = CASES[name]
    reads = name in READS
    said = {
        "kind": "tower",
        "name": name,
        "objective": name,
        "settings": settings,
        "backbone": backbone,
        "text": {"layers": 2, "length": 32} if reads else None,
        "side": 64,
        "mixture": [{"scenes": 64, "use": "captions" if reads else "pictures", "weight": 1}],
        "schedule": {"steps": 1, "batch_size": 8, "learning_rate": 1e-3, "bf16": False},
    }
    return TowerStage.model_validate(said | changes)


@dataclass(frozen=True)
class Subject:
    """A real objective with random weights, ready to train, one batch for it, and how much text is in a sample."""

    objective: Objective
    batch: Mapping[str, Any]
    tokens: int = 0  # of a row
    supervised: int = 0  # of them, those that a loss is taken of


def prepared(stage: TowerStage, samples: int) -> Subject:
    """The objective of `stage` and a batch of scenes."""
    set_seed(1)
    workshop = Workshop(Path(), None)
    objective = build_tower_objective(stage, workshop)
    if stage.schedule.gradient_checkpointing:
        objective.gradient_checkpointing_enable({"use_reentrant": False})
    pictures = opened(stage.mixture, stage.side, workshop, 0)[0]
    places = Mixture([Views(pictures, objective.sample)], [1.0], samples, 1)
    return Subject(ready(objective), objective.collate([places[place] for place in range(samples)]))


def ready(objective: Objective) -> Objective:
    """The same, as the trainer has it at the first step."""
    freeze_all_but(objective, objective.trained_parameters())
    objective.begin_step(0, 100)
    return objective.train()


def prepared_language(samples: int) -> Subject:
    """A small language model and blocks of 64 words at random."""
    set_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(JOEY)
    said = {"kind": "language", "name": "language", "tokenizer": "", "width": 96, "layers": 4, "heads": 4}
    said |= {"feed_forward": 256, "block": 64, "texts": [{"scenes": 1, "weight": 1}]}
    stage = LanguageStage.model_validate(said | {"schedule": {"steps": 1, "batch_size": 8, "learning_rate": 1e-3}})
    objective = ready(LanguageObjective(new_language_model(stage, tokenizer), tokenizer))
    return Subject(
        objective, {"blocks": torch.randint(len(tokenizer), (samples, stage.block))}, stage.block, stage.block
    )


def prepared_instruct(samples: int) -> Subject:
    """Joey, all of whose parts train, and lessons of scenes."""
    model, processor = load_llava(JOEY)
    objective = ready(InstructObjective(model, processor, ("tower", "projector", "language"), 400))
    lessons = SceneLessons(samples, processor.image_processor.size["height"], 0)
    batch = objective.collate([lessons.sample(place, np.random.default_rng(place)) for place in range(samples)])
    return Subject(objective, batch, batch["ids"].shape[1], len(batch["targets"]) // samples)


@contextmanager
def counting(*known: nn.Module | Tensor) -> Iterator[Callable[[], int]]:
    """Counts bytes of all storages that autograd keeps inside, those of `known` left out."""
    seen: dict[int, int] = {}
    alive: list[Tensor] = []  # a storage that is freed could lend its address to the next
    left_out = set()
    for one in known:
        tensors = [one] if isinstance(one, Tensor) else [*one.parameters(), *one.buffers()]
        left_out |= {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in left_out and tensor.numel():
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(seen.values())


@dataclass(frozen=True)
class Kept:
    """Bytes kept by layers and by heads and loss, measured and by formula, and bf16 copies of weights among them."""

    layers: int
    layers_by_formula: float
    loss: int  # 0 where it was measured together with the layers
    loss_by_formula: float
    copies: int  # by formula

    def ratio(self) -> float:
        """All that the formulas say by all that was measured."""
        return (self.layers_by_formula + self.loss_by_formula + self.copies) / (self.layers + self.loss)


def measured(stage: TowerStage, samples: int = 8, half: bool = False) -> Kept:
    """One forward of `stage` on `samples` samples, in fp32 or in bf16 autocast."""
    return measured_of(prepared(stage, samples), samples, half, stage.schedule.gradient_checkpointing)


def measured_of(subject: Subject, samples: int, half: bool = False, checkpointed: bool = False) -> Kept:
    """One forward of `subject`."""
    objective, batch = subject.objective, subject.batch
    named = float((batch["region_of"] >= 0).float().mean()) if "region_of" in batch else 1.0
    costs = loss_costs(objective, Batch(samples, 1, subject.supervised, half, named), scale=1.0)
    layers = kept_by(passes_of(objective, subject.tokens or None), samples, half, checkpointed)
    narrow = weights_of(objective).half_copies if half else 0
    with torch.autocast("cpu", dtype=torch.bfloat16) if half else nullcontext():
        if not isinstance(objective, WholeBatchObjective):
            with counting(objective) as bytes_of:
                objective(**batch)
                return Kept(bytes_of(), layers, 0, costs.kept, narrow)
        with counting(objective) as bytes_of:
            representations = objective.represent(**batch)
            of_layers = bytes_of()
        leaves = {
            name: value.detach().requires_grad_(value.is_floating_point()) for name, value in representations.items()
        }
        with counting(objective, *leaves.values()) as bytes_of:
            objective.compare(leaves)
            return Kept(of_layers, layers, bytes_of(), costs.kept, narrow)


CHECKPOINTED = {"schedule": {"steps": 1, "batch_size": 8, "learning_rate": 1e-3, "gradient_checkpointing": True}}
# How a step is run: what changes in the stage, and whether in bf16 autocast.
HOWS: dict[str, tuple[dict[str, Any], bool]] = {
    "fp32": ({}, False),
    "bf16": ({}, True),
    "eager": ({"attention": "eager"}, False),
    "checkpointed": (CHECKPOINTED, False),
}


TEXT: dict[str, Callable[[int], Subject]] = {"language": prepared_language, "instruct": prepared_instruct}


def _told(kept: Kept) -> tuple[str, str, str]:
    return f"{kept.layers:,}", f"{kept.loss:,}" if kept.loss else "with the layers", f"{kept.ratio():.2f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8)
    samples = parser.parse_args().samples
    table = Table(title=f"bytes kept for the way back, {samples} samples on a CPU, and formula / measured")
    for column in ("objective", "how", "layers", "heads and loss", "formula / measured"):
        table.add_column(column, justify="left" if column in ("objective", "how") else "right")
    for name in CASES:
        for how, (changes, half) in HOWS.items():
            table.add_row(name, how, *_told(measured(stage_of(name, **changes), samples, half)))
    for name, prepare in TEXT.items():
        for how, half in (("fp32", False), ("bf16", True)):
            table.add_row(name, how, *_told(measured_of(prepare(samples), samples, half)))
    Console().print(table)


if __name__ == "__main__":
    main()
