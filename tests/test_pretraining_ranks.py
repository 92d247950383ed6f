"""Two processes train as one does on the joined batch: every objective, through the one trainer, over gloo."""

from pathlib import Path
from typing import Any

import pytest
import torch

from serving.engine import free_port
from tests.ranks import as_launched, on_two_ranks
from tests.small_runs import assert_same_gradients
from tests.test_pretraining import CASES, gradients_of_a_step, stage_of
from tests.tiny import make_tiny_tokenizer
from training.config import TowerStage


def deterministic(name: str, settings: dict[str, Any] | None = None, **schedule: Any) -> TowerStage:
    """The tiny stage of `name` without stochastic depth, whose dropped paths would differ from rank to rank.

    `settings` change the objective's own.
    """
    backbone = CASES[name][1] | ({"drop_path": 0.0} if name == "dinov2" else {})
    said = CASES[name][0] | (settings or {})
    return stage_of(name, backbone=backbone, settings=said, schedule={"steps": 1, **schedule})


ROUNDING = 2e-6  # of a gradient
# What differs from the shipped form of an objective and gathers otherwise, by a title: an objective and its settings.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "frozen": ("dino", {"frozen_prototypes": 1.0}),
    "spreading": ("dino", {"koleo_weight": 0.1}),
}


def train_as(rank: int, runs: Path, port: int, plans: list[tuple[str, str, dict[str, Any]]]) -> None:
    """What one of two processes does: the first step of each plan; the first rank keeps the gradients."""
    as_launched(rank, port)
    for title, name, changes in plans:
        gradients = gradients_of_a_step(deterministic(name, **changes), runs, runs / f"{title}-{rank}")
        if rank == 0:
            torch.save(gradients, runs / f"{title}.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the first gradients of each objective on two ranks, at once and accumulated."""
    folder = tmp_path_factory.mktemp("ranks")
    make_tiny_tokenizer(tmp_path_factory.mktemp("words")).save_pretrained(folder / "tokenizer" / "output")
    plans: list[tuple[str, str, dict[str, Any]]] = [(f"{name}-at-once", name, {"batch_size": 4}) for name in CASES]
    plans += [(f"{name}-in-parts", name, {"batch_size": 2, "accumulation": 2}) for name in CASES]
    plans += [(title, name, {"batch_size": 4, "settings": said}) for title, (name, said) in VARIANTS.items()]
    on_two_ranks(train_as, folder, free_port(), plans)
    return folder


@pytest.mark.parametrize("how", ["at-once", "in-parts"])
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_have_the_gradient_of_one_process(name: str, how: str, runs: Path, tmp_path: Path) -> None:
    """Four samples on each of two ranks give the gradient of eight in one process; also as two times two each."""
    whole = gradients_of_a_step(deterministic(name), runs, tmp_path)
    assert_same_gradients(torch.load(runs / f"{name}-{how}.pt"), whole, ROUNDING)


@pytest.mark.parametrize("title", VARIANTS)
def test_so_have_variants(title: str, runs: Path, tmp_path: Path) -> None:
    name, settings = VARIANTS[title]
    whole = gradients_of_a_step(deterministic(name, settings), runs, tmp_path)
    assert_same_gradients(torch.load(runs / f"{title}.pt"), whole, ROUNDING)


def test_the_optimiser_gets_no_gradient_of_frozen_prototypes(runs: Path) -> None:
    assert "head.prototypes" not in torch.load(runs / "frozen.pt")
    assert "head.prototypes" in torch.load(runs / "dino-at-once.pt")
