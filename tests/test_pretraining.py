"""Every objective trains through the one trainer: exactly what it names, resumed and accumulated as if in one piece."""

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, TrainerCallback, set_seed

from assistant.towers import load_tower
from tests.tiny import make_tiny_tokenizer
from training.config import RecipeError, Schedule, TowerStage
from training.data.pictures import DataError
from training.data.samples import Mixture, Views
from training.data.scenes import make_scene
from training.recipe import run_stage
from training.schedules import cosine
from training.stages import Workshop, build_tower_objective, opened, run_tower
from training.trainer import ObjectiveTrainer

VIT = {"width": 32, "layers": 2, "heads": 2, "patch": 8, "image_side": 32}
CROPS = {"small_side": 16, "small_count": 1, "prototypes": 24, "head_hidden": 32, "bottleneck": 16}
# What each objective is tried with: its settings, a backbone that fits it, and whether it reads texts.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "clip": ({}, {"family": "clip", **VIT}, True),
    "siglip": ({"start_temperature": 10, "start_bias": -10}, {"family": "siglip", **VIT}, True),
    "words": ({"start_temperature": 10, "start_bias": -10}, {"family": "siglip", **VIT}, True),
    "simclr": ({"head_hidden": 32, "projection": 16}, {"family": "vit", **VIT}, False),
    "moco": ({"head_hidden": 32, "projection": 16}, {"family": "vit", **VIT}, False),
    "mae": ({"decoder_width": 32, "decoder_layers": 1, "decoder_heads": 2}, {"family": "vit", **VIT}, False),
    "dino": ({**CROPS, "frozen_prototypes": 0}, {"family": "vit", **VIT}, False),
    "dinov2": ({**CROPS, "frozen_prototypes": 0}, {"family": "dinov2", "drop_path": 0.2, **VIT}, False),
}


def stage_of(objective: str, /, **changes: Any) -> TowerStage:
    """A tiny stage of `objective` on generated scenes."""
    settings, backbone, reads = CASES[objective]
    schedule = {"steps": 4, "batch_size": 8, "learning_rate": 1e-3, "bf16": False, "evaluate_every": 4}
    said = {
        "kind": "tower",
        "name": objective,
        "objective": objective,
        "settings": settings,
        "backbone": backbone,
        "text": {"layers": 1, "length": 8} if reads else None,
        "tokenizer": "tokenizer" if reads else None,
        "side": 32,
        "mixture": [{"scenes": 64, "use": "captions" if reads else "pictures", "weight": 1}],
        "held_out_samples": 8,
        "schedule": schedule | {"save_every": 2, "log_every": 1} | changes.pop("schedule", {}),
    }
    return TowerStage.model_validate(said | changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs that holds a finished tokenizer."""
    folder = tmp_path_factory.mktemp("runs")
    make_tiny_tokenizer(tmp_path_factory.mktemp("words")).save_pretrained(folder / "tokenizer" / "output")
    return folder


class _Gradients(TrainerCallback):
    """Keeps the gradient of every parameter just before the first step of the optimiser."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **unused: Any) -> None:
        if not self.kept:
            self.kept = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def gradients_of_a_step(stage: TowerStage, runs: Path, folder: Path) -> dict[str, Tensor]:
    """The clipped gradient of the first step of `stage`."""
    set_seed(1)
    workshop = Workshop(runs, None)
    objective = build_tower_objective(stage, workshop)
    pictures = opened(stage.mixture, stage.side, workshop, 0)[0]
    samples: Mixture[Any] = Mixture([Views(pictures, objective.sample)], [1.0], 64, 1)
    trainer = ObjectiveTrainer(objective, stage.schedule, folder, samples, samples)
    gradients = _Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return gradients.kept


@pytest.mark.parametrize("name", CASES)
def test_a_run_exports_what_transformers_loads_and_resumes_exactly(name: str, runs: Path) -> None:
    """The export is a plain checkpoint; stopped after two of four steps, a run ends with the same weights."""
    stage = stage_of(name)
    workshop = Workshop(runs, None)
    run_stage(stage, workshop)
    output = runs / name / "output"
    assert AutoModel.from_pretrained(output).config.model_type
    assert AutoImageProcessor.from_pretrained(output).size["height"] == 32
    assert load_tower(output).width == 32
    if CASES[name][2]:
        assert len(AutoTokenizer.from_pretrained(output)) > 0
    first = load_file(output / "model.safetensors")
    (runs / name / "done.json").unlink()
    shutil.rmtree(output)
    shutil.rmtree(runs / name / "checkpoints" / "checkpoint-4")
    run_stage(stage, workshop)
    logged = [json.loads(line) for line in (runs / name / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "loss" in line] == [1, 2, 3, 4, 3, 4]
    second = load_file(output / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(first[key].equal(second[key]) for key in first)


def write_streamed_tars(folder: Path, tars: int = 2, samples: int = 10) -> None:
    """Compressed tars of scenes with captions, which can only be read from start to end."""
    folder.mkdir()
    for number in range(tars):
        with tarfile.open(folder / f"part-{number}.tar.gz", "w:gz") as tar:
            for place in range(samples):
                scene = make_scene(100 * number + place, 64)
                drawn = io.BytesIO()
                scene.image.save(drawn, "PNG")
                for suffix, content in (("png", drawn.getvalue()), ("txt", scene.captions[0].encode())):
                    member = tarfile.TarInfo(f"{number}-{place}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize(
    ("name", "accumulation"), [("siglip", 2), ("mae", 2), pytest.param("simclr", 1, marks=pytest.mark.slow)]
)
def test_a_streamed_run_resumes_exactly(name: str, accumulation: int, runs: Path, tmp_path: Path) -> None:
    """From compressed tars, stopped after two of four steps: the same losses as uninterrupted, nothing read twice."""
    write_streamed_tars(tmp_path / "tars")
    use = "captions" if CASES[name][2] else "pictures"
    stage = stage_of(
        name,
        name=f"{name}-streamed",
        mixture=[{"tars": "tars/part-*.tar.gz", "stream": True, "use": use, "weight": 1}],
        held_out=[{"scenes": 8, "weight": 1}],
        schedule={"batch_size": 4, "accumulation": accumulation},
    )
    workshop = Workshop(runs, tmp_path)
    folder = runs / stage.name
    run_stage(stage, workshop)
    first = load_file(folder / "output" / "model.safetensors")
    (folder / "done.json").unlink()
    shutil.rmtree(folder / "output")
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    run_stage(stage, workshop)
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in logged if "loss" in line]
    assert len(set(losses[:4])) == 4
    assert losses[4:] == losses[2:4]
    second = load_file(folder / "output" / "model.safetensors")
    assert all(first[key].equal(second[key]) for key in first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixture": [{"scenes": 8, "stream": True, "weight": 1}]}, "only tars can be streamed, not a scenes"),
        ({"mixture": [{"tars": "a.tar", "stream": True, "weight": 1}]}, "name the pictures that validate in held_out"),
        (
            {
                "mixture": [{"tars": "a.tar", "stream": True, "weight": 1}, {"scenes": 8, "weight": 1}],
                "held_out": [{"scenes": 8, "weight": 1}],
            },
            "a stream cannot be mixed",
        ),
    ],
)
def test_streams_refuse_what_they_cannot_do(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stage_of("siglip", **changes)


@pytest.mark.parametrize("name", CASES)
def test_what_is_named_moves_and_nothing_else(name: str, runs: Path, tmp_path: Path) -> None:
    """Every trained parameter gets a gradient and no other one does; the optimiser holds exactly these."""
    stage = stage_of(name, schedule={"steps": 1, "weight_decay": 0.0})
    objective = build_tower_objective(stage, Workshop(runs, None))
    gradients = gradients_of_a_step(stage, runs, tmp_path)
    moving = {key for key, gradient in gradients.items() if float(gradient.abs().max()) > 0}
    named = objective.trained_parameters()
    assert moving <= named
    # A key's bias shifts all scores of a softmax alike: its gradient is zero but for rounding.
    assert {key for key in named - moving if not key.endswith(("k_proj.bias", "key.bias"))} == set()


@pytest.mark.parametrize("name", CASES)
def test_eight_at_once_equal_two_times_four(name: str, runs: Path, tmp_path: Path) -> None:
    """Accumulated over two micro-batches, the gradient is that of the whole batch: losses compare across all of it."""
    changes: dict[str, Any] = {}
    if name == "dinov2":  # its dropped paths fall otherwise in batches of another size
        changes["backbone"] = CASES[name][1] | {"drop_path": 0.0}
    whole = gradients_of_a_step(stage_of(name, schedule={"steps": 1}, **changes), runs, tmp_path / "whole")
    schedule = {"steps": 1, "batch_size": 4, "accumulation": 2}
    parts = gradients_of_a_step(stage_of(name, schedule=schedule, **changes), runs, tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for key, gradient in whole.items():
        assert torch.allclose(parts[key], gradient, rtol=1e-3, atol=2e-6), key


def test_layers_further_down_learn_less(runs: Path, tmp_path: Path) -> None:
    """With layer-wise decay the optimiser's rates fall by the same share from layer to layer."""
    stage = stage_of("dino")
    objective = build_tower_objective(stage, Workshop(runs, None))
    samples: Any = [None]
    trainer = ObjectiveTrainer(objective, stage.schedule, tmp_path, samples, samples, layer_decay=0.5)
    trainer.create_optimizer()
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    by_name = {name: rates[id(p)] for name, p in objective.named_parameters() if id(p) in rates}
    assert by_name["tower.model.layernorm.weight"] == pytest.approx(1e-3)
    assert by_name["tower.model.layers.1.layernorm_before.weight"] == pytest.approx(0.5e-3)
    assert by_name["tower.model.layers.0.layernorm_before.weight"] == pytest.approx(0.25e-3)
    assert by_name["tower.model.embeddings.cls_token"] == pytest.approx(0.125e-3)


def test_weight_decay_follows_its_cosine(runs: Path, tmp_path: Path) -> None:
    """At the last step it is where the formula says, and parameters without decay keep none."""
    stage = stage_of("mae", schedule={"weight_decay": 0.04, "final_weight_decay": 0.4})
    run_tower(stage, Workshop(tmp_path, None))
    state = torch.load(tmp_path / "mae" / "checkpoints" / "checkpoint-4" / "optimizer.pt", weights_only=True)
    decays = sorted({group["weight_decay"] for group in state["param_groups"]})
    assert decays == [0.0, pytest.approx(cosine(0.04, 0.4, 3, 4))]


def test_gradient_checkpointing_changes_no_weight(runs: Path, tmp_path: Path) -> None:
    """It saves memory only."""
    plain = gradients_of_a_step(stage_of("mae", schedule={"steps": 1}), runs, tmp_path / "plain")
    saving = stage_of("mae", schedule={"steps": 1, "gradient_checkpointing": True})
    run_tower(saving, Workshop(tmp_path / "saving", None))
    run_tower(stage_of("mae", schedule={"steps": 1}), Workshop(tmp_path / "keeping", None))
    first = load_file(tmp_path / "saving" / "mae" / "output" / "model.safetensors")
    second = load_file(tmp_path / "keeping" / "mae" / "output" / "model.safetensors")
    assert plain
    assert all(torch.allclose(first[key], second[key], atol=1e-5) for key in first)


def test_a_published_tower_goes_on(runs: Path, tmp_path: Path) -> None:
    """A run can start from what another one exported, with another objective too; the picture half of a SigLIP here."""
    run_stage(stage_of("siglip", name="first", schedule={"steps": 2}), Workshop(runs, None))
    run_stage(stage_of("dino", name="second", backbone=None, start_from="first"), Workshop(runs, None))
    assert AutoModel.from_pretrained(runs / "second" / "output").config.model_type == "siglip_vision_model"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "simclrr"}, r"no objective 'simclrr'; there are clip, dino"),
        ({"objective": "language"}, r"trains no tower"),
        ({"settings": {"temperatur": 1}}, r"simclr: settings.temperatur: Extra inputs"),
        ({"backbone": None}, r"either a backbone, which is new, or start_from"),
        ({"start_from": "elsewhere"}, r"either a backbone, which is new, or start_from"),
    ],
)
def test_a_recipe_that_cannot_run_says_why(changes: dict[str, Any], message: str) -> None:
    """Unknown objectives and settings are found when the recipe is read."""
    with pytest.raises(ValueError, match=message):
        stage_of("simclr", **changes)


def test_parts_that_do_not_fit_say_so_before_the_first_step(runs: Path, tmp_path: Path) -> None:
    """A tower without what the objective needs, a batch of one, a set of one picture."""
    resnet = {"family": "resnet", "depth": 18, "image_side": 32}
    with pytest.raises(RecipeError, match=r"stage mae: .*patch tokens"):
        build_tower_objective(stage_of("mae", backbone=resnet), Workshop(runs, None))
    with pytest.raises(RecipeError, match=r"stage clip: .*CLIPModel"):
        build_tower_objective(stage_of("clip", text=None), Workshop(runs, None))
    with pytest.raises(ValueError, match="2 or more"):
        run_tower(stage_of("simclr", schedule={"batch_size": 1}), Workshop(tmp_path, None))
    with pytest.raises(DataError, match="one picture"):
        run_tower(stage_of("simclr", mixture=[{"scenes": 1, "use": "pictures", "weight": 1}]), Workshop(tmp_path, None))


def test_a_resnet_trains_too(runs: Path) -> None:
    """SimCLR of a ResNet-18, exported as transformers' own."""
    resnet = {"family": "resnet", "depth": 18, "image_side": 32}
    run_stage(stage_of("simclr", name="resnet", backbone=resnet, schedule={"steps": 2}), Workshop(runs, None))
    assert AutoModel.from_pretrained(runs / "resnet" / "output").config.model_type == "resnet"


def test_schedules_refuse_what_makes_no_sense() -> None:
    """A schedule is checked when it is read."""
    with pytest.raises(ValueError, match="steps"):
        Schedule(steps=0, batch_size=1, learning_rate=1.0)
