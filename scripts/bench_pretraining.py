"""Compare our pretraining losses and steps with lightly's, open_clip's and transformers', in turn on the same inputs.

Example, on a quiet machine: python scripts/bench_pretraining.py --threads 2 --batch 16 --out pretraining.json
"""

import json
import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

# The profiler that counts memory reports its own life to the terminal, and each tensor that it had not seen made.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
import transformers
import typer

from scripts.benchmarks import losses, picture_text, self_supervised
from scripts.benchmarks.measuring import Disagreement, Limit, Pair, Result, compare
from scripts.benchmarks.workbench import TINY, Sizes, Workbench
from training.arguments import has_fast_bf16

CONTRASTIVE = {"nt-xent": losses.nt_xent, "clip-loss": losses.clip, "siglip-loss": losses.siglip}
STEPS: dict[str, Callable[[Workbench], Pair]] = {
    "simclr": self_supervised.simclr_pair,
    "mae": self_supervised.mae_pair,
    "mae-light": self_supervised.light_mae_pair,
    "dino": self_supervised.dino_pair,
    "dinov2": self_supervised.dinov2_pair,
    "clip": picture_text.open_clip_pair,
    "clip-transformers": picture_text.clip_pair,
    "siglip": picture_text.siglip_pair,
}
DISTILLATION = ("dino-loss", "ibot-loss", "koleo-loss")
NAMES = (*CONTRASTIVE, *DISTILLATION, *STEPS)
PEERS = ("lightly", "open_clip_torch", "timm", "transformers", "torch")
PRODUCT_SIDE = 4096  # of the matrix product whose speed is the limit


def chosen_pairs(names: Iterable[str], batches: Iterable[int], bench: Workbench) -> Iterator[Pair]:
    """The pairs of those names, each made when its turn comes, so that one at a time is in memory."""
    sizes, device = bench.sizes, bench.device
    for name in names:
        if name in CONTRASTIVE:
            for batch in batches:
                yield CONTRASTIVE[name](batch, device)
        elif name == "dino-loss":
            yield losses.dino(sizes.batch, 2 + sizes.small_crops, sizes.prototypes, device)
        elif name == "ibot-loss":
            yield losses.ibot(sizes.batch, sizes.prototypes, device)
        elif name == "koleo-loss":
            yield losses.koleo(max(batches), device)
        else:
            yield STEPS[name](bench)


def described(result: Result, peak: float) -> dict[str, Any]:
    """A result as JSON has it; `peak` in floating-point operations a second."""
    return asdict(result) | {
        "ratio": result.ratio,
        "limit_seconds": result.our_flops / peak,
        "their_limit_seconds": result.their_flops / peak,
    }


HEADINGS = ("work", "peer", "ratio", "spread", "ours ms", "theirs ms", "limit ms", "of limit", "ours MB", "theirs MB")
WIDTHS = (34, 13, 6, 12, 9, 9, 9, 8, 9, 9)


def line(cells: Iterable[str]) -> str:
    """A row of the table: names to the left, numbers to the right."""
    padded = (
        cell.ljust(width) if place < 2 else cell.rjust(width)
        for place, (cell, width) in enumerate(zip(cells, WIDTHS, strict=True))
    )
    return "  ".join(padded)


def row(result: Result, peak: float) -> str:
    """A result as the table has it."""
    limit = result.our_flops / peak
    return line(
        [
            result.name,
            result.peer,
            f"{result.ratio:.2f}",
            f"{min(result.ratios):.2f}-{max(result.ratios):.2f}",
            f"{1000 * result.our_seconds:.1f}",
            f"{1000 * result.their_seconds:.1f}",
            f"{1000 * limit:.1f}",
            f"{100 * limit / result.our_seconds:.0f} %",
            f"{result.our_memory / 1e6:.1f}",
            f"{result.their_memory / 1e6:.1f}",
        ]
    )


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in PEERS},
    }


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    only: Annotated[
        list[str] | None, typer.Option(help=f"What to compare; may be given again. One of: {', '.join(NAMES)}.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often the two sides take turns.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="Threads of both sides.")] = os.cpu_count() or 1,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Steps in bf16 autocast on both sides; losses stay in fp32.")
    ] = False,
    side: Annotated[int | None, typer.Option(min=16, help="Pixels of a (large) view.")] = None,
    batch: Annotated[int | None, typer.Option(min=2, help="Pictures a step.")] = None,
    loss_batches: Annotated[str, typer.Option(help="Batches of the contrastive losses.")] = "256,1024,4096",
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Tiny models and prototypes: shows that it runs, says nothing of speed.")
    ] = False,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="Also write all figures there, as JSON.")] = None,
) -> None:
    """Compare our pretraining with the libraries that do the same, on this machine.

    Each comparison first computes one loss on both sides and stops when they differ. Then both sides take turns, so
    that whatever else the machine does hits them alike. A ratio above 1 says that ours is faster; it is the median over
    the rounds, and the spread is the lowest and the highest. The limit is what the step's arithmetic would take at the
    speed of a large matrix product here. Memory is what tensors take at the peak beyond what was there before: for a
    step that is without weights and optimiser.

    Sizes are ViT-S/16 unless you say otherwise; DINO's steps then want several GB and most of the time.

        python scripts/bench_pretraining.py --only nt-xent --only siglip-loss

        python scripts/bench_pretraining.py --only mae --only mae-light --bf16 --batch 32 --out mae.json
    """
    names = only or list(NAMES)
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]} is none of: {', '.join(NAMES)}", param_hint="--only")
    try:
        batches = [int(number) for number in loss_batches.split(",")]
    except ValueError as error:
        raise typer.BadParameter("give whole numbers with commas between", param_hint="--loss-batches") from error
    if bf16 and not has_fast_bf16():
        typer.echo("bf16 is not fast on this machine; both sides pay for it", err=True)
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings(
        "ignore", message=".*weight_norm.* is deprecated", category=FutureWarning
    )  # lightly's heads
    sizes = TINY if tiny else Sizes()
    sizes = replace(sizes, side=side or sizes.side, batch=batch or sizes.batch)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    limit = Limit(256 if tiny else PRODUCT_SIDE, torch.bfloat16 if bf16 else torch.float32, device)
    with tempfile.TemporaryDirectory() as folder:
        bench = Workbench(sizes, bf16, device, Path(folder))
        results = measured(chosen_pairs(names, batches, bench), rounds, limit)
    if out is not None:
        figures = {"machine": machine(device), "sizes": asdict(sizes), "bf16": bf16, "peak": limit.speed}
        report = figures | {"results": [described(result, limit.speed) for result in results]}
        out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        typer.echo(f"written to {out}")


def measured(pairs: Iterable[Pair], rounds: int, limit: Limit) -> list[Result]:
    """Compare each pair, and print its row at once. Ends the program where two sides disagree."""
    typer.echo(f"{limit.speed / 1e9:.0f} GFLOP/s in a large matrix product, {torch.get_num_threads()} threads")
    typer.echo(line(HEADINGS))
    results = []
    for pair in pairs:
        try:
            results.append(compare(pair, rounds, limit.device))
        except Disagreement as error:
            typer.echo(f"not compared: {error}", err=True)
            raise typer.Exit(1) from error
        limit.look_again()
        typer.echo(row(results[-1], limit.speed))
    return results


if __name__ == "__main__":
    app()
