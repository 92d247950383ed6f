"""Weights that FSDP spreads over two processes train as whole ones do, and are whole again for an export."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModel, set_seed

from serving.engine import free_port
from tests.ranks import RANKS, as_launched, on_two_ranks
from tests.test_pretraining_ranks import deterministic
from tests.tiny import make_tiny_tokenizer
from training.data.samples import Mixture, Views
from training.objective import Objective, total_loss
from training.sharding import gather_weights, is_sharded, load_whole_weights
from training.stages import Workshop, build_tower_objective, opened
from training.trainer import freeze_all_but

SAMPLES = 8
STEPS = 2
NAMES = ("siglip", "mae", "moco", "dinov2")


def prepared(name: str, runs: Path) -> tuple[Objective, Mixture[Any]]:
    """The tiny objective of `name`, ready to train, and what it trains on."""
    set_seed(1)
    stage = deterministic(name)
    objective = build_tower_objective(stage, Workshop(runs, None))
    freeze_all_but(objective, objective.trained_parameters())
    pictures = opened(stage.mixture, stage.side, Workshop(runs, None), 0)[0]
    return objective.train(), Mixture([Views(pictures, objective.sample)], [1.0], 64, 1)


def trained(objective: Objective, samples: Mixture[Any], rank: int, ranks: int) -> None:
    """Two steps of plain gradient descent on this rank's part of eight samples each."""
    optimiser = torch.optim.SGD([weight for weight in objective.parameters() if weight.requires_grad], lr=0.01)
    share = SAMPLES // ranks
    for step in range(STEPS):
        first = step * SAMPLES + rank * share
        objective.begin_step(step, STEPS)
        batch = objective.collate([samples[first + place] for place in range(share)])
        total_loss(objective(**batch)).backward()
        objective.before_update(step, STEPS)
        optimiser.step()
        optimiser.zero_grad()
        objective.after_step(step, STEPS)


def train_sharded(rank: int, runs: Path, port: int) -> None:
    """What one of two processes does: each layer and the rest sharded, trained, made whole and exported."""
    as_launched(rank, port)
    init_process_group("gloo", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    for name in NAMES:
        objective, samples = prepared(name, runs)
        weights = dict(objective.named_parameters()) | dict(objective.named_buffers())
        whole = {key: value.detach().clone() for key, value in weights.items()}
        for stack in [module for module in objective.modules() if isinstance(module, nn.ModuleList)]:
            for layer in stack:
                fully_shard(layer, mesh=mesh)
        fully_shard(objective, mesh=mesh)
        assert is_sharded(objective)
        with torch.no_grad():
            for weight in objective.parameters():
                weight.zero_()
        load_whole_weights(objective, whole)
        with pytest.raises(ValueError, match="of another objective"):
            load_whole_weights(objective, {"stranger": torch.zeros(1)})
        trained(objective, samples, rank, RANKS)
        gather_weights(objective)
        assert not is_sharded(objective)
        if rank == 0:
            objective.export(runs / f"{name}-sharded")
    destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each objective exported after two steps on two ranks."""
    folder = tmp_path_factory.mktemp("sharded")
    make_tiny_tokenizer(tmp_path_factory.mktemp("words")).save_pretrained(folder / "tokenizer" / "output")
    on_two_ranks(train_sharded, folder, free_port())
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_sharded_training_exports_what_one_process_does(name: str, runs: Path, tmp_path: Path) -> None:
    """The same weights after two steps, teacher and all, in a checkpoint that transformers loads."""
    objective, samples = prepared(name, runs)
    trained(objective, samples, 0, 1)
    objective.export(tmp_path)
    alone, sharded = (load_file(folder / "model.safetensors") for folder in (tmp_path, runs / f"{name}-sharded"))
    assert alone.keys() == sharded.keys()
    for key, weight in alone.items():
        torch.testing.assert_close(sharded[key], weight, rtol=1e-4, atol=1e-5, msg=key)
    assert AutoModel.from_pretrained(runs / f"{name}-sharded").config.architectures == [
        type(AutoModel.from_pretrained(tmp_path)).__name__
    ]
