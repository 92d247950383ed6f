"""Trains every objective from nothing in one equal budget and measures the towers: the table of docs/pretraining.md.

Takes the shards of `--data`; a run that was stopped goes on when it is called again.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from transformers import set_seed

from assistant.models import JOEY
from training.config import TowerStage
from training.data.pictures import DataError
from training.evaluation.tower_report import Wanted, measure_tower
from training.recipe import run_stage
from training.stages import Workshop, build_tower_objective

BACKBONE = {"width": 128, "layers": 5, "heads": 4, "patch": 8, "image_side": 64}
CROPS = {"small_side": 32, "small_count": 4, "prototypes": 2048, "head_hidden": 512, "bottleneck": 128}


@dataclass(frozen=True)
class Plan:
    """What one row of the table trains; size of the tower, pictures and batch are the same for all."""

    objective: str
    settings: dict[str, Any]
    family: str
    rate: float
    names: bool = False  # whether what pictures are called is taught beside their captions


CLIP, SIGLIP = {"start_temperature": 14.3}, {"start_temperature": 10, "start_bias": -4.1}
PLANS = {
    "clip": Plan("clip", CLIP, "clip", 1e-3),
    "clip-names": Plan("clip", CLIP, "clip", 1e-3, names=True),
    # The published bias of -10 suits batches of tens of thousands: at 64 a pair is true once in 64, and ln 63 is 4.1.
    # At 1e-3 the pictures draw together in the first hundred steps, before bias and temperature have moved.
    "siglip": Plan("siglip", SIGLIP, "siglip", 5e-4),
    "siglip-names": Plan("siglip", SIGLIP, "siglip", 5e-4, names=True),
    "simclr": Plan("simclr", {"temperature": 0.2, "head_hidden": 512}, "vit", 1e-3),
    # The published momentum of 0.99 averages a hundred steps, a twelfth of this run, and its frozen patch embedding
    # steadies runs of many epochs. Both were changed at once, and kNN of training pictures spoke for it.
    "moco": Plan(
        "moco",
        {"head_hidden": 512, "projection": 128, "momentum": 0.95, "freeze_patch_embedding": False},
        "vit",
        1e-3,
    ),
    # Our lighter decoder (256 channels, 4 layers) and the published one (512, 8), shrunk as this tower is from a ViT-S.
    "mae": Plan("mae", {"decoder_width": 96, "decoder_layers": 4, "decoder_heads": 3}, "vit", 1e-3),
    "mae-published-decoder": Plan("mae", {"decoder_width": 192, "decoder_layers": 8, "decoder_heads": 6}, "vit", 1e-3),
    # KoLeo is DINOv2's: without it the outputs of so short a run, 64 pictures a step, lie along a few directions. At
    # its published weight of 0.1 it spreads more than they learn. The published momenta of 0.996 and 0.992 average
    # 250 and 125 steps.
    "dino": Plan("dino", CROPS | {"koleo_weight": 0.03, "momentum": 0.99}, "vit", 5e-4),
    "dinov2": Plan("dinov2", CROPS | {"koleo_weight": 0.03, "momentum": 0.99}, "dinov2", 5e-4),
}
READERS = ("clip", "siglip")
CACHE = "pixels"  # folder in RUNS, shared by all rows
SHARDS = ("flickr8k-train", "coco-train")
NAMED = ("tiny-imagenet-train", "sports-train")
WORDLESS = "caltech101-train"  # its pictures, without their labels, for objectives that need no words
PAIRS = "flickr8k-validation"
TEST = "caltech101-test"
# Labels that captions speak of: 6 landscapes and 100 sports. Of Caltech's 101 only 21 stand in ten captions or more.
SAID = ("natural-train", "sports-train")
COLUMNS = (
    ("kNN", "pooled", TEST),
    ("kNN", "patches", TEST),
    ("linear probe", "pooled", TEST),
    ("linear probe", "patches", TEST),
    *(("zero-shot", "shared", shard) for shard in (TEST, *SAID)),
    ("picture to text R@10", "shared", TEST),
    ("text to picture R@10", "shared", TEST),
)


def stage_of(name: str, pictures: int, batch: int, cache: Path) -> TowerStage:
    """The stage that trains `name` on so many pictures, `batch` at a time; decoded pixels are kept in `cache`."""
    plan = PLANS[name]
    reads = plan.objective in READERS
    return TowerStage.model_validate(
        {
            "kind": "tower",
            "name": name,
            "objective": plan.objective,
            "settings": plan.settings,
            "backbone": {"family": plan.family, **BACKBONE},
            "text": {"layers": 3, "length": 24} if reads else None,
            "tokenizer": str(JOEY) if reads else None,
            "side": BACKBONE["image_side"],
            "attention": "eager",
            "mixture": [
                {"shard": shard, "use": use, "weight": 1, "cache": str(cache.absolute())}
                for shard, use in uses_of(plan).items()
            ],
            "held_out_samples": 2 * batch,
            "schedule": {
                "steps": pictures // batch,
                "batch_size": batch,
                "learning_rate": plan.rate,
                "warmup_steps": pictures // batch // 10,
                "weight_decay": 0.05,
                "evaluate_every": pictures // batch,
                "log_every": 20,
            },
        }
    )


def uses_of(plan: Plan) -> dict[str, str]:
    """The shards that `plan` trains on, each with what is taught of its pictures."""
    if plan.objective not in READERS:
        return dict.fromkeys((*SHARDS, WORDLESS), "pictures")
    return dict.fromkeys(SHARDS, "captions") | (dict.fromkeys(NAMED, "labels") if plan.names else {})


def first_of(family: str) -> str:
    """The first objective that trains a tower of `family`."""
    return next(name for name, plan in PLANS.items() if plan.family == family)


def untrained(objective: str, workshop: Workshop) -> str:
    """Write a tower for `objective` as it is before its first step, where a finished stage leaves its own; its name."""
    name = f"untrained {PLANS[objective].family}"
    folder = workshop.runs / name / "output"
    if not folder.is_dir():
        set_seed(1)
        build_tower_objective(stage_of(objective, 128, 2, workshop.runs / CACHE), workshop).export(folder)
    return name


def tests_of(plan: Plan) -> list[Wanted]:
    """What a tower of `plan` is asked; labels that it was taught are no test of zero-shot."""
    if plan.objective not in READERS:
        return [Wanted(WORDLESS, TEST, features="both")]
    said = [Wanted(test=shard) for shard in SAID if shard not in uses_of(plan)]
    return [Wanted(WORDLESS, TEST, PAIRS, features="both"), *said]


def row_of(name: str, plan: Plan, workshop: Workshop, steps: int) -> dict[str, Any]:
    """What the table says of the finished tower called `name`, which was trained, or is to be, as `plan` says."""
    folder = workshop.runs / name
    scores = {
        (score["measure"], score["features"], wanted.test): 100 * score["right"]
        for wanted in tests_of(plan)
        for score in measure_tower(folder / "output", wanted, workshop.data_folder())["scores"]
    }
    return {
        "objective": name,
        "steps": steps,
        "samples_per_second": speed_of(folder / "log.jsonl"),
        "scores": [scores.get(column) for column in COLUMNS],
    }


def speed_of(log: Path) -> float | None:
    """Pictures a second where the machine was left alone: nine in ten progress lines of the training show fewer.

    None for a tower that was not trained.
    """
    if not log.is_file():
        return None
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    speeds = sorted(line["samples_per_second"] for line in lines if "samples_per_second" in line)
    return float(speeds[len(speeds) * 9 // 10]) if speeds else None


def table_line(row: dict[str, Any]) -> str:
    """A row of the page's table: kNN, probe (pooled and mean of patches), zero-shot of each test, R@10 both ways."""
    speed = "-" if row["samples_per_second"] is None else f"{row['samples_per_second']:.0f}"
    figures = ["-" if score is None else f"{score:.1f}" for score in row["scores"]]
    return f"| {' | '.join([row['objective'], str(row['steps']), speed, *figures])} |"


def tell(row: dict[str, Any], runs: Path) -> None:
    """Print a row and keep it in RUNS/rows.jsonl."""
    with (runs / "rows.jsonl").open("a") as sink:
        sink.write(json.dumps(row) + "\n")
    Console(width=200).print(table_line(row), markup=False)


def main(
    data: Annotated[Path, typer.Option(envvar="KANGAROO_DATA", help="Folder of the picture shards.", exists=True)],
    runs: Annotated[Path, typer.Option(help="Where towers and checkpoints go.")] = Path("runs/proof"),
    pictures: Annotated[int, typer.Option(min=256, help="Pictures that each objective sees.")] = 240_000,
    batch: Annotated[int, typer.Option(min=2, help="Pictures a step.")] = 64,
    only: Annotated[list[str] | None, typer.Option(help="Only these objectives.")] = None,
) -> None:
    """Train, measure, and print the rows of the table; each is also kept in RUNS/rows.jsonl."""
    workshop = Workshop(runs, data)
    names = only or list(PLANS)
    unknown = set(names) - set(PLANS)
    if unknown:
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}; there are {', '.join(PLANS)}", param_hint="--only")
    try:
        for name in dict.fromkeys(first_of(PLANS[name].family) for name in names):
            tell(row_of(untrained(name, workshop), PLANS[name], workshop, 0), runs)
        for name in names:
            run_stage(stage_of(name, pictures, batch, workshop.runs / CACHE), workshop)
            tell(row_of(name, PLANS[name], workshop, pictures // batch), runs)
    except DataError as error:
        raise typer.BadParameter(str(error), param_hint="--data") from error


if __name__ == "__main__":
    typer.run(main)
