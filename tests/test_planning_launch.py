"""What plan writes can be launched: its recipe reads back, accelerate reads its configuration, its commands run."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from rich.console import Console
from safetensors.torch import load_file

from serving.engine import free_port
from tests.test_pretraining import stage_of
from training.config import RECIPES, RecipeError, read_recipe, rehearsal
from training.planning.costs import WAYS, Step
from training.planning.costs_report import Wanted, planned, report_costs
from training.planning.launching import (
    bytes_in,
    commands,
    fsdp_config,
    launched_recipe,
    layer_classes,
    rates_for,
    write_recipe,
)
from training.planning.overview import report_overview

SHIPPED = sorted(file.stem for file in RECIPES.glob("*.yaml"))
TOWERS = ["clip", "dino", "dinov2", "mae", "moco", "siglip", "simclr", "words"]


@pytest.mark.parametrize(
    ("said", "size"),
    [
        ("80GB", 80e9),
        ("141GiB", 141 * 2**30),
        ("50GB/s", 50e9),
        ("400Gb/s", 50e9),
        (" 1.5tb ", 1.5e12 / 8),
        ("1e3MB", 1e9),
    ],
)
def test_sizes_are_read_as_people_write_them(said: str, size: float) -> None:
    assert bytes_in(said, "--memory") == size


@pytest.mark.parametrize("said", ["", "80", "GB", "-1GB", "0GB", "1.2.3GB", "80XB", "80GB/h"])
def test_a_size_that_is_none_is_refused(said: str) -> None:
    with pytest.raises(RecipeError, match=r"--link .* is no size"):
        bytes_in(said, "--link")


def test_rates_follow_the_two_rules() -> None:
    """Sixteen times the samples: four times the rate by the square root, sixteen times by the line."""
    schedule = stage_of("mae", schedule={"batch_size": 64, "accumulation": 4}).schedule
    rates = rates_for(schedule, 16 * 256)
    assert (rates.before, rates.after) == (256, 4096)
    assert rates.root == pytest.approx(4e-3) and rates.linear == pytest.approx(16e-3)


@pytest.mark.parametrize("name", TOWERS)
def test_the_launched_recipe_reads_back_and_sees_as_many_samples(name: str, tmp_path: Path) -> None:
    recipe, _, step = planned(Wanted(name, 64), tmp_path)
    file = tmp_path / "launched.yaml"
    write_recipe(launched_recipe(recipe, step), file)
    back = read_recipe(str(file))
    before, after = recipe.stages[0].schedule, back.stages[0].schedule  # type: ignore[union-attr]
    assert back == launched_recipe(recipe, step)
    samples = [s.steps * s.batch_size * s.accumulation * ranks for s, ranks in ((before, 1), (after, 64))]
    assert samples[1] == pytest.approx(samples[0], rel=0.01)
    assert after.warmup_steps / after.steps == pytest.approx(before.warmup_steps / before.steps, rel=0.05)
    said = before.model_dump() | {
        field: getattr(after, field)
        for field in (
            "steps",
            "batch_size",
            "accumulation",
            "learning_rate",
            "warmup_steps",
            "evaluate_every",
            "save_every",
        )
    }
    assert after.model_dump() == said | {"gradient_checkpointing": step.way.checkpointed}
    assert launched_recipe(recipe, step, steps=5000).stages[0].schedule.steps == 5000  # type: ignore[union-attr]


def test_commands_name_every_machine() -> None:
    step = Step(stage_of("mae"), 512, 64, 1, True, WAYS[0])
    torchrun, accelerate = commands(step, "r.yaml", None, per_machine=8)
    assert "--nnodes 64 --nproc-per-node 8" in torchrun and "$FIRST" in torchrun
    assert "--num_machines 64 --num_processes 512" in accelerate and "--machine_rank $RANK" in accelerate
    *_, zero = commands(step, "r.yaml", Path("plan/deepspeed.yaml"), per_machine=8)
    assert zero.startswith("accelerate launch --config_file plan/deepspeed.yaml --machine_rank $RANK")
    one = commands(Step(stage_of("mae"), 8, 64, 1, True, WAYS[0]), "my recipe.yaml", None, per_machine=8)
    assert all("FIRST" not in command and "'my recipe.yaml'" in command for command in one)
    assert commands(Step(stage_of("mae"), 1, 64, 1, True, WAYS[0]), "r.yaml", None, 8) == [
        "kangaroo train r.yaml --data DATA"
    ]


def test_the_configuration_is_one_that_accelerate_reads(tmp_path: Path) -> None:
    """With the classes of all layers, those of teachers and text halves too."""
    _, costs, step = planned(Wanted("siglip", 512, "1GB"), tmp_path)
    assert step.way.sharded
    assert layer_classes(costs.objective) == ["SiglipEncoderLayer"]
    file = tmp_path / "fsdp.yaml"
    file.write_text(fsdp_config(costs.objective, step, 8))
    read = load_config_from_file(str(file))
    assert (read.num_machines, read.num_processes, read.mixed_precision) == (64, 512, "bf16")
    assert read.distributed_type == "FSDP"
    assert read.fsdp_config["fsdp_transformer_layer_cls_to_wrap"] == "SiglipEncoderLayer"
    assert read.fsdp_config["fsdp_version"] == 2


def test_deepspeed_is_configured_for_shards_of_gradients(tmp_path: Path) -> None:
    """Where the weights fit a device; FSDP has its own file, so there is one of the two."""
    report_costs(Wanted("mae", 16), tmp_path / "runs", tmp_path / "plan", console := Console(record=True, width=140))
    assert "--config_file" in console.export_text() and not (tmp_path / "plan" / "fsdp.yaml").exists()
    read = load_config_from_file(str(tmp_path / "plan" / "deepspeed.yaml"))
    assert (read.distributed_type, read.num_machines, read.num_processes) == ("DEEPSPEED", 2, 16)
    assert read.deepspeed_config["zero_stage"] == 2 and read.deepspeed_config["gradient_clipping"] == 1.0


def test_the_report_says_what_fits_and_how_to_start_it(tmp_path: Path) -> None:
    console = Console(record=True, width=140)
    facts = report_costs(Wanted("dinov2", 512, "2.5GB"), tmp_path / "runs", tmp_path / "plan", console)
    said = console.export_text()
    for words in ("FSDP, checkpointed fits", "sums of Sinkhorn-Knopp", "32,768 samples", "square-root", "fsdp.yaml"):
        assert words in said
    assert (tmp_path / "plan" / "fsdp.yaml").is_file() and (tmp_path / "plan" / "dinov2-512.yaml").is_file()
    assert facts["sent_bytes"] == pytest.approx(sum(message["sent"] for message in facts["messages"]))
    assert not (tmp_path / "runs").exists()


def test_recipes_are_compared_a_line_each() -> None:
    console = Console(record=True, width=300)
    report_overview([Wanted(name, 8) for name in ("clip", "simclr", "scenes:language")], Path("nowhere"), console)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in console.export_text().splitlines()]
    assert [row[0] for row in rows if row and "--" not in row[0]] == ["recipe", "clip", "simclr", "scenes:language"]
    assert {len(row) for row in rows if row} == {12}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny recipe of scenes as plan writes it for two devices."""
    folder = tmp_path_factory.mktemp("launched")
    stage = stage_of("mae", schedule={"batch_size": 4}).model_dump(mode="json", exclude_unset=True)
    recipe = {"name": "tiny", "about": "A tiny run.", "publish": "mae", "dtype": "float32", "stages": [stage]}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    wanted = Wanted(str(folder / "tiny.yaml"), devices=2, fp32=True)
    report_costs(wanted, folder / "runs", folder / "plan", Console(quiet=True))
    return folder / "plan" / "tiny-2.yaml"


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_the_command_that_is_said_runs(launcher: str, launched: Path, tmp_path: Path) -> None:
    """On two processes that talk over gloo: what is said for GPUs, less the word for GPUs, plus a port of one's own."""
    recipe = read_recipe(str(launched))
    step = Step(recipe.stages[0], 2, 4, 1, False, WAYS[0])  # type: ignore[arg-type]
    said = next(command for command in commands(step, str(launched), None, 8) if command.startswith(launcher))
    words: list[str] = shlex.split(said.replace("--multi_gpu", "--cpu").replace(" --data DATA", ""))
    port = {"torchrun": "--master-port", "accelerate": "--main_process_port"}[launcher]
    place = 2 if launcher == "accelerate" else 1
    words = [*words[:place], port, str(free_port()), *words[place:], "--runs", str(tmp_path / "runs")]
    words[0] = str(Path(sys.executable).with_name(words[0]))
    environment: dict[str, Any] = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    log = (tmp_path / "runs" / "tiny-2" / "mae" / "log.jsonl").read_text()
    assert done.stdout.count("The result is in") == 1
    assert '"train_samples_per_second"' in log
    assert (tmp_path / "runs" / "tiny-2" / "model" / "model.safetensors").is_file()
    # Each rank leaves its random state. Without GPUs and MPI accelerate starts one process, whatever it is told.
    ranks = {file.name for file in (tmp_path / "runs" / "tiny-2" / "mae" / "checkpoints").glob("*/rng_state*")}
    assert ranks == ({"rng_state_0.pth", "rng_state_1.pth"} if launcher == "torchrun" else {"rng_state.pth"})


@pytest.mark.slow
def test_deepspeed_ends_with_the_weights_of_torchrun(launched: Path, tmp_path: Path) -> None:
    """Two processes with ZeRO-2. Wants `pip install deepspeed`, which is none of our packages."""
    pytest.importorskip("deepspeed")
    environment: dict[str, Any] = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    config = yaml.safe_load(launched.with_name("deepspeed.yaml").read_text())
    (tmp_path / "zero.yaml").write_text(yaml.safe_dump(config | {"use_cpu": True}))
    train = ["-m", "ui.command_line", "train", str(launched), "--runs"]
    starts = {
        "zero": ["accelerate", "launch", "--config_file", str(tmp_path / "zero.yaml"), "--main_process_port"],
        "plain": ["torchrun", "--nproc-per-node", "2", "--master-port"],
    }
    ends = {}
    for name, start in starts.items():
        words = [
            str(Path(sys.executable).with_name(start[0])),
            *start[1:],
            str(free_port()),
            *train,
            str(tmp_path / name),
        ]
        done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        ends[name] = load_file(tmp_path / name / "tiny-2" / "model" / "model.safetensors")
    assert ends["zero"].keys() == ends["plain"].keys()
    for name, value in ends["plain"].items():
        torch.testing.assert_close(ends["zero"][name], value, rtol=1e-4, atol=1e-5)


def test_a_launched_recipe_can_be_rehearsed(launched: Path) -> None:
    assert rehearsal(read_recipe(str(launched))).stages[0].schedule.steps == 2  # type: ignore[union-attr]
