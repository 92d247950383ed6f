"""Compare a step of visual instruction tuning (LoRA) with transformers' Trainer and TRL's, in turn on the same lessons.

Example, on a quiet machine: python scripts/bench_tuning.py --threads 2 --out tuning.json
"""

import json
import math
import os
import statistics
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
import transformers
import typer
from transformers import PrinterCallback

from scripts.bench_pretraining import machine
from scripts.benchmarks import tuning
from scripts.benchmarks.contest import Contest, TakesTurns
from scripts.benchmarks.measuring import Disagreement, compare
from training.arguments import has_fast_bf16

SKIPPED = 2  # first steps, in which kernels are prepared
FP32_TOLERANCE, BF16_TOLERANCE = 1e-3, 2e-2
SUPERVISED = 0.25
HEAD_TOKENS = 2048


def agree(losses: dict[str, list[float]], tolerance: float) -> None:
    """Raises Disagreement where a peer's loss of some step is not ours."""
    for name, theirs in losses.items():
        for step, (ours, other) in enumerate(zip(losses["kangaroo"], theirs, strict=True), start=1):
            if not math.isclose(ours, other, rel_tol=tolerance):
                raise Disagreement(f"step {step}: our loss is {ours}, that of {name} {other}")


def steps_compared(batches: int, epochs: int, sizes: tuning.Sizes, peers: list[str], bf16: bool) -> dict[str, Any]:
    """Seconds of each step of ours and of `peers`, which take turns, and ratios of them.

    Raises Disagreement when they do not lose alike in every step.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").mkdir()
        model, data = tuning.make_model(sizes, folder / "model"), tuning.write_lessons(batches, sizes.side, folder)
        ours, order = tuning.our_trainer(model, data, batches * epochs, folder, bf16)
        rows = tuning.Rows(data, order)
        build = {"transformers": tuning.transformers_trainer, "trl": tuning.trl_trainer}
        trainers = {"kangaroo": ours} | {peer: build[peer](ours, model, rows, folder) for peer in peers}
        contest = Contest(list(trainers))
        for trainer_name, trainer in trainers.items():
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(TakesTurns(contest, trainer_name))
        contest.run({trainer_name: trainer.train for trainer_name, trainer in trainers.items()})
        losses = {trainer_name: tuning.losses_of(trainer) for trainer_name, trainer in trainers.items()}
    agree(losses, BF16_TOLERANCE if bf16 else FP32_TOLERANCE)
    # An epoch leaves some lessons aside to validate on, so it has fewer steps than there are batches.
    epoch = len(set(order)) // len(tuning.ANSWERS)
    return {"seconds": contest.seconds, "losses": losses, "steps_of_an_epoch": epoch} | _ratios(contest.seconds, epoch)


def _ratios(seconds: dict[str, list[float]], epoch: int) -> dict[str, Any]:
    first, later = slice(SKIPPED, epoch), slice(epoch + 1, None)
    found: dict[str, Any] = {}
    for peer, theirs in seconds.items():
        for name, part in (("first epoch", first), ("later epochs", later)):
            ratios = [b / a for a, b in zip(seconds["kangaroo"][part], theirs[part], strict=True)]
            if peer != "kangaroo" and ratios:
                found[f"{peer}, {name}"] = [statistics.median(ratios), min(ratios), max(ratios)]
    ours = seconds["kangaroo"]
    if ours[first] and ours[later]:
        found["later epochs beside the first"] = statistics.median(ours[first]) / statistics.median(ours[later])
    return found


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    only: Annotated[list[str] | None, typer.Option(help="transformers, trl or head; may be given again.")] = None,
    batches: Annotated[int, typer.Option(min=3, help="Batches of eight lessons in the data.")] = 8,
    epochs: Annotated[int, typer.Option(min=1, help="How often they are seen.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="How often the two sides of head and loss take turns.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="Threads of all sides.")] = os.cpu_count() or 1,
    bf16: Annotated[bool, typer.Option(help="bf16 autocast on all sides.")] = has_fast_bf16(),
    tiny: Annotated[bool, typer.Option("--tiny", help="A tiny model: shows that it runs, no more.")] = False,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="Also write all figures there, as JSON.")] = None,
) -> None:
    """Compare our tuning with the libraries that do the same, on this machine.

    Three real trainers train one adapter of one model on the same lessons in the same order, a step each in turn, and
    have to lose alike in every step. A ratio above 1 says that ours is faster: the median over the steps, and the
    lowest and the highest.
    """
    unknown = set(only or ()) - {"transformers", "trl", "head"}
    if unknown:
        raise typer.BadParameter(f"{sorted(unknown)[0]!r} is not one of transformers, trl, head", param_hint="--only")
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    sizes = tuning.TINY if tiny else tuning.Sizes()
    report: dict[str, Any] = {"machine": machine(torch.device("cpu")), "sizes": asdict(sizes), "bf16": bf16}
    peers = [name for name in ("transformers", "trl") if name in (only or ("transformers", "trl"))]
    try:
        if peers:
            report["steps"] = steps_compared(batches, epochs, sizes, peers, bf16)
            _print_steps(report["steps"])
        if only is None or "head" in only:
            pair = tuning.head_and_loss(HEAD_TOKENS, sizes.width, sizes.vocabulary, SUPERVISED, torch.device("cpu"))
            found = compare(pair, rounds, torch.device("cpu"))
            report["head"] = asdict(found) | {"ratio": found.ratio}
            less = found.their_memory / found.our_memory
            typer.echo(f"{found.name}: {found.ratio:.2f} x faster, {less:.1f} x less memory")
    except Disagreement as error:
        raise typer.BadParameter(str(error), param_hint="this comparison") from error
    if out is not None:
        out.write_text(json.dumps(report, indent=2) + "\n")
        typer.echo(f"written to {out}")


def _print_steps(found: dict[str, Any]) -> None:
    for name, seconds in found["seconds"].items():
        typer.echo(f"{name}: {statistics.median(seconds[SKIPPED:]):.2f} s a step")
    for name, ratios in found.items():
        if isinstance(ratios, list):
            typer.echo(f"beside {name}: {ratios[0]:.2f} ({ratios[1]:.2f}-{ratios[2]:.2f})")
    if "later epochs beside the first" in found:
        typer.echo(f"ours, later epochs beside the first: {found['later epochs beside the first']:.2f} x faster")


if __name__ == "__main__":
    app()
