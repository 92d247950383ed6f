"""Say what a stage costs on many devices, and how to launch it: tables for people, and the files of the launch."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from training.config import Recipe, RecipeError, read_recipe
from training.planning.costs import SPARE, WAYS, Costs, Step, TrainedStage
from training.planning.launching import (
    bytes_in,
    commands,
    deepspeed_config,
    fsdp_config,
    launched_recipe,
    machines,
    rates_for,
    write_recipe,
)
from training.planning.subjects import Subjects
from training.stages import Workshop

FEW_STEPS = 2000  # fewer than these, and a schedule has hardly warmed up


@dataclass(frozen=True)
class Wanted:
    """What is to be planned, as the command line says it."""

    recipe: str  # with :STAGE behind it where it has several
    devices: int = 8
    memory: str = "80GB"
    link: str = "50GB/s"
    per_machine: int = 8
    batch: int | None = None  # samples of a step over all devices
    steps: int | None = None  # as many samples as the recipe's own where unset
    fp32: bool = False


def planned(wanted: Wanted, runs: Path) -> tuple[Recipe, Costs, Step]:
    """The recipe, the formulas for its stage, and the first way to lay its step out that fits.

    The step is the recipe's batch on each device, without accumulation, or the wanted batch shared out. Raises
    RecipeError where recipe, stage or numbers do not go together.
    """
    recipe, stage = recipe_and_stage(wanted.recipe)
    machines(wanted.devices, wanted.per_machine)
    costs = Costs(stage, Subjects(Workshop(runs / recipe.name, None), recipe.stages).objective(stage))
    memory = bytes_in(wanted.memory, "--memory")
    samples = _samples(stage, wanted)
    first = Step(stage, wanted.devices, samples, 1, not wanted.fp32, WAYS[0])
    for way in WAYS if wanted.devices > 1 else WAYS[:2]:
        step = replace(first, way=way)
        if costs.largest_batch(step, memory) >= samples:
            return recipe, costs, step
    return recipe, costs, _accumulated(costs, replace(first, way=WAYS[-1 if wanted.devices > 1 else 1]), memory)


def _samples(stage: TrainedStage, wanted: Wanted) -> int:
    if wanted.batch is None:
        return stage.schedule.batch_size
    if wanted.batch % wanted.devices:
        raise RecipeError(f"--batch {wanted.batch} does not divide among {wanted.devices} devices")
    return wanted.batch // wanted.devices


def _accumulated(costs: Costs, step: Step, memory: float) -> Step:
    """The same batch in as many parts as it takes. Raises RecipeError where not even one sample fits."""
    most = costs.largest_batch(step, memory)
    if most == 0:
        least = sum(costs.memory(replace(step, samples=1)).values()) / (1 - SPARE)
        raise RecipeError(
            f"one sample of stage {step.stage.name} takes {gigabytes(least)} on each of {step.devices} devices "
            f"({step.way}), more than --memory: take more or larger devices, or a smaller tower"
        )
    divisors = (parts for parts in range(1, step.samples + 1) if step.samples % parts == 0)
    parts = next(parts for parts in divisors if step.samples // parts <= most)
    return replace(step, samples=step.samples // parts, accumulation=parts)


def recipe_and_stage(said: str) -> tuple[Recipe, TrainedStage]:
    """What `RECIPE` or `RECIPE:STAGE` names. Raises RecipeError where there is no such stage, or several."""
    name, _, chosen = said.partition(":")
    recipe = read_recipe(name)
    trained = [stage for stage in recipe.stages if isinstance(stage, TrainedStage)]
    if not trained:
        raise RecipeError(f"{name} has no stage whose costs can be planned: a tower, a language model or instructions")
    found = [stage for stage in trained if stage.name == chosen] if chosen else trained
    if len(found) != 1:
        why = f"no stage {chosen!r} that trains a model" if chosen else "several stages"
        known = ", ".join(f"{name}:{stage.name}" for stage in trained)
        raise RecipeError(f"{name} has {why}: name one of {known}")
    return recipe, found[0]


def gigabytes(size: float) -> str:
    """Bytes for people, decimal."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} B"


def _named(step: Step) -> str:
    return str(step.way) if step.devices > 1 else str(step.way).replace("DDP", "one device")


def memory_table(costs: Costs, step: Step, memory: float) -> Table:
    """Bytes on one device by part, a column for each way to lay the step out."""
    ways = WAYS if step.devices > 1 else WAYS[:2]
    steps = [replace(step, way=way) for way in ways]
    columns = [costs.memory(one) for one in steps]
    table = Table(title=f"memory of one device, {step.samples} samples at once")
    table.add_column("part")
    for one in steps:
        table.add_column(_named(one), justify="right")
    for part in dict.fromkeys(part for column in columns for part, size in column.items() if size):
        table.add_row(part, *(gigabytes(column[part]) if column.get(part) else "-" for column in columns))
    table.add_section()
    table.add_row("in all", *(gigabytes(sum(column.values())) for column in columns), style="bold")
    table.add_row("most samples that fit", *(f"{costs.largest_batch(one, memory):,}" for one in steps))
    return table


def messages_table(costs: Costs, step: Step, link: float) -> Table:
    """What one device sends in a step, and how long that takes where nothing hides it."""
    table = Table(title=f"sent by one device in a step, {step.way}, {step.devices} devices")
    for column in ("what", "how", "times", "bytes sent", "seconds"):
        table.add_column(column, justify="left" if column in ("what", "how") else "right")
    for message in costs.messages(step):
        sent = message.sent(step.devices)
        table.add_row(message.what, message.kind, str(message.times), gigabytes(sent), f"{sent / link:.2g}")
    table.add_section()
    sent = costs.sent(step)
    table.add_row("in all", "", "", gigabytes(sent), f"{sent / link:.2g}", style="bold")
    return table


def facts(wanted: Wanted, costs: Costs, step: Step) -> dict[str, Any]:
    """The same as numbers, for JSON."""
    return {
        "recipe": wanted.recipe,
        "stage": step.stage.name,
        "devices": step.devices,
        "way": str(step.way),
        "samples_a_device": step.samples,
        "accumulation": step.accumulation,
        "samples_a_step": step.all_samples,
        "bf16": step.half,
        "memory_bytes": costs.memory(step),
        "messages": [vars(message) | {"sent": message.sent(step.devices)} for message in costs.messages(step)],
        "sent_bytes": costs.sent(step),
        "flops_a_device": costs.flops(step),
    }


def report_costs(wanted: Wanted, runs: Path, out: Path, console: Console) -> dict[str, Any]:
    """Print tables and commands; write the changed recipe, and for several devices a configuration, into `out`."""
    recipe, costs, step = planned(wanted, runs)
    memory, link = bytes_in(wanted.memory, "--memory"), bytes_in(wanted.link, "--link")
    console.print(memory_table(costs, replace(step, accumulation=1), memory))
    if step.devices > 1:
        console.print(messages_table(costs, step, link))
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{recipe.name}-{step.devices}.yaml"
    launched = launched_recipe(recipe, step, wanted.steps)
    write_recipe(launched, file)
    config = _written_config(costs, step, wanted.per_machine, out)
    for line in [*_said(costs, step, launched), *_to_launch(step, file, config, wanted.per_machine)]:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    return facts(wanted, costs, step)


def _written_config(costs: Costs, step: Step, per_machine: int, out: Path) -> Path | None:
    if step.devices == 1:
        return None
    config = out / ("fsdp.yaml" if step.way.sharded else "deepspeed.yaml")
    said = fsdp_config(costs.objective, step, per_machine) if step.way.sharded else deepspeed_config(step, per_machine)
    config.write_text(said)
    return config


def _to_launch(step: Step, file: Path, config: Path | None, per_machine: int) -> list[str]:
    everywhere = " on every machine ($FIRST: the first one's address; $RANK: its own number, from 0)"
    how = " by one of these; deepspeed.yaml is for ZeRO-2, which wants `pip install deepspeed`"
    several = how if step.devices > 1 and not step.way.sharded else ""
    place = everywhere if step.devices > per_machine else ""
    lines = [f"\n{file} is the recipe changed so. To launch it{several}{place}:"]
    return lines + [f"\n  {command}" for command in commands(step, str(file), config, per_machine)]


def _said(costs: Costs, step: Step, launched: Recipe) -> list[str]:
    """Which way fits, the batch, and the rate that goes with it, in words."""
    schedule, rates = step.stage.schedule, rates_for(step.stage.schedule, step.all_samples)
    now = next(stage.schedule for stage in launched.stages if stage.name == step.stage.name)  # type: ignore[union-attr]
    parts = f" in {step.accumulation} parts" if step.accumulation > 1 else ""
    lines = [
        f"\n{_named(step)} fits. A step is {step.devices} x {step.samples * step.accumulation}{parts} = "
        f"{step.all_samples:,} samples, and {costs.flops(step) / 1e12:.3g} TFLOP on each device."
    ]
    if rates.after != rates.before:
        seen, before = now.steps * rates.after, schedule.steps * rates.before
        lines.append(
            f"The recipe's rate of {schedule.learning_rate:g} is for {rates.before:,} samples. For {rates.after:,} the "
            f"square-root rule for AdamW says {rates.root:.3g}, the linear rule {rates.linear:.3g}; try both in short "
            f"runs. {now.steps:,} steps see {seen:,} samples; the recipe's {schedule.steps:,} see {before:,}."
        )
    if now.steps < FEW_STEPS <= schedule.steps:
        lines.append(f"{now.steps:,} steps are few: say --steps if you have more data, or take a smaller --batch.")
    return lines
