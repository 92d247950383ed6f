"""What a stage is about to do, measured before it starts: what trains, memory, time, and tokens of a step."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.utils.data import Dataset

from training.arguments import has_fast_bf16
from training.config import InstructStage
from training.objective import total_loss
from training.objectives.instruct import PREFIXES, InstructObjective, Lesson
from training.ranks import met
from training.trainer import freeze_all_but

ADAM_BYTES = 8  # of a trained weight: two moments in float32
PARTS = {"tower": "vision tower", "projector": "projector", "language": "language model"}
GIB = 2**30


@dataclass(frozen=True)
class PartPlan:
    """One part of the model: all its weights, and those that train."""

    name: str
    weights: int
    trained: int
    remark: str = ""


@dataclass(frozen=True)
class TeachingPlan:
    """What was found out: counts of parameters, bytes, seconds and tokens."""

    parts: tuple[PartPlan, ...]
    samples: int  # of a step, over its micro-batches
    tokens: int  # of a step
    supervised: int  # of these
    steps: int
    held_bytes: int  # weights, gradients and Adam's moments
    kept_bytes: int  # what one micro-batch keeps for the way back
    seconds: float  # of a step, measured; evaluation and checkpoints come on top


def measured_plan(objective: InstructObjective, stage: InstructStage, lessons: Dataset[Lesson]) -> TeachingPlan:
    """Run two micro-batches forward and back, and leave the objective as it was, without gradients.

    The first warms up and is measured for memory, the second for time; the weights do not move.
    """
    freeze_all_but(objective, objective.trained_parameters())
    schedule = stage.schedule
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    objective.to(device).train()
    tokens, supervised, seconds, kept = 0, 0, 0.0, 0
    for number in range(2):
        places = range(number * schedule.batch_size, (number + 1) * schedule.batch_size)
        batch = objective.collate([lessons[place % len(lessons)] for place in places])  # type: ignore[arg-type]
        tokens += objective.tokens_of(batch)
        supervised += len(batch["targets"])
        seconds, saved = _forward_and_back(objective, batch, schedule.bf16, device)
        kept = max(kept, saved)
    objective.zero_grad(set_to_none=True)
    shares = schedule.accumulation * met().num_processes  # of a step; every process looks at its own first lessons
    return TeachingPlan(
        parts=tuple(parts_of(objective)),
        samples=schedule.batch_size * shares,
        tokens=tokens * shares // 2,
        supervised=supervised * shares // 2,
        steps=schedule.steps,
        held_bytes=held_bytes(objective),
        kept_bytes=kept,
        seconds=seconds * schedule.accumulation,
    )


def _forward_and_back(
    objective: InstructObjective, batch: Mapping[str, Any], bf16: bool | None, device: torch.device
) -> tuple[float, int]:
    """Seconds that it took, and bytes that were kept between the two."""
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    mixed = has_fast_bf16() if bf16 is None else bf16
    began = time.monotonic()
    with counting_kept() as kept, torch.autocast(device.type, torch.bfloat16) if mixed else nullcontext():
        loss = total_loss(objective(**inputs))
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - began, sum(kept.values())


@contextmanager
def counting_kept() -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd keeps for the way back, parameters left out."""
    kept: dict[int, int] = {}

    def note(value: Tensor) -> Tensor:
        if not isinstance(value, torch.nn.Parameter):
            storage = value.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        yield kept


def parts_of(objective: InstructObjective) -> Iterator[PartPlan]:
    """The parts of a LLaVA, with how much of each trains."""
    trained = objective.trained_parameters()
    own = objective.adapter.parameters() if objective.adapter is not None else set()
    for part, prefixes in PREFIXES.items():
        inside = {name: p for name, p in objective.named_parameters() if name.startswith(prefixes)}
        weights = sum(_count(p) for name, p in inside.items() if name.removeprefix("model.") not in own)
        adapted = part == "language" and objective.adapter is not None
        remark = objective.adapter.told() if adapted and objective.adapter is not None else ""
        yield PartPlan(PARTS[part], weights, sum(_count(p) for name, p in inside.items() if name in trained), remark)


def _count(parameter: Tensor) -> int:
    """How many weights it holds; two of 4 bits lie in a byte."""
    return parameter.numel() * (1 if parameter.is_floating_point() else 2)


def held_bytes(objective: InstructObjective) -> int:
    """Bytes of the weights, and of gradients and Adam's moments of those that train."""
    held = sum(p.numel() * p.element_size() for p in objective.parameters())
    return held + sum(p.numel() * (p.element_size() + ADAM_BYTES) for p in objective.parameters() if p.requires_grad)


def plan_table(plan: TeachingPlan) -> Table:
    """The plan as a table for the terminal: parts, then what a step and the whole run take."""
    table = Table("part", "weights", "of these train", "how", title="What trains")
    for part in plan.parts:
        how = part.remark or ("all of it" if part.trained else "stands still")
        table.add_row(part.name, f"{part.weights:,}", f"{part.trained:,}", how)
    table.add_section()
    learned = f"{plan.supervised:,} of them learned"
    table.add_row("a step", f"{plan.samples} lessons", f"{plan.tokens:,} tokens", learned)
    table.add_row("memory", "", f"{(plan.held_bytes + plan.kept_bytes) / GIB:.2f} GiB", memory_in_words(plan))
    measured = f"{plan.seconds:.2f} s a step, measured"
    table.add_row("time", f"{plan.steps} steps", duration(plan.seconds * plan.steps), measured)
    return table


def memory_in_words(plan: TeachingPlan) -> str:
    """What the memory is for."""
    held, kept = plan.held_bytes / GIB, plan.kept_bytes / GIB
    return f"{held:.2f} for weights, gradients and Adam, {kept:.2f} for a batch on its way"


def duration(seconds: float) -> str:
    """Hours and minutes, or seconds where it is short."""
    if seconds < 100:
        return f"about {seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"about {minutes} min" if minutes < 100 else f"about {minutes / 60:.1f} h"
