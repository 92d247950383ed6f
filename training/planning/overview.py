"""Compare what several recipes cost on as many devices, a line each, as a table in Markdown."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from training.planning.costs import Costs, Step
from training.planning.costs_report import Wanted, gigabytes, planned
from training.planning.launching import bytes_in

COLUMNS = (
    "recipe",
    "trained",
    "layout",
    "a device",
    "a step",
    "weights and AdamW",
    "activations",
    "heads and loss",
    "most a device",
    "sent: weights",
    "sent: loss",
    "seconds",
)
OF_LOSS = {"heads and loss", "loss, working"}
OF_LAYERS = {"activations", "a layer again"}
OF_WEIGHTS = {"gradients", "weights", "buffers"}


def report_overview(wanted: Iterable[Wanted], runs: Path, console: Console) -> None:
    """Print a line for each recipe. Raises RecipeError where one cannot be planned."""
    table = Table(box=box.MARKDOWN)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("recipe", "layout") else "right", no_wrap=True)
    for one in wanted:
        _, costs, step = planned(one, runs)
        table.add_row(*_row(one, costs, step))
    console.print(table, soft_wrap=True)


def _row(wanted: Wanted, costs: Costs, step: Step) -> list[str]:
    memory = costs.memory(step)
    loss = sum(memory[part] for part in OF_LOSS)
    layers = sum(memory.get(part, 0.0) for part in OF_LAYERS)
    sent = [(message.what, message.sent(step.devices)) for message in costs.messages(step)]
    of_weights = sum(size for what, size in sent if what in OF_WEIGHTS)
    of_loss = sum(size for what, size in sent if what not in OF_WEIGHTS)
    parts = f" in {step.accumulation} parts" if step.accumulation > 1 else ""
    most = costs.largest_batch(replace(step, accumulation=1), bytes_in(wanted.memory, "--memory"))
    return [
        wanted.recipe,
        f"{costs.weights.trained / 4e6:.3g} M",
        str(step.way),
        f"{step.samples * step.accumulation}{parts}",
        f"{step.all_samples:,}",
        gigabytes(sum(memory.values()) - loss - layers),
        gigabytes(layers),
        gigabytes(loss),
        f"{most:,}",
        gigabytes(of_weights),
        gigabytes(of_loss),
        f"{(of_weights + of_loss) / bytes_in(wanted.link, '--link'):.2g}",
    ]
