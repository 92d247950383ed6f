"""What is looked at while a tower trains is measured right, and looking leaves no trace in what trains."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import set_seed

from serving.engine import free_port
from tests.ranks import as_launched, on_two_ranks
from tests.small_runs import (
    HELD_OUT,
    SIDE,
    assert_same_weights,
    logged,
    scenes,
    small_run,
    small_stage,
    weights_in,
)
from tests.tiny import make_tiny_tokenizer
from training.config import Monitor, MonitorSource
from training.data.pictures import DataError
from training.evaluation.probes import knn_labels
from training.monitors import TowerMonitor
from training.objectives.dino import DinoObjective
from training.random_state import only_looking
from training.representation import alignment, kept_direction, rank_me, uniformity
from training.stages import Workshop, build_tower_objective, opened_monitor


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs that holds a finished tokenizer."""
    folder = tmp_path_factory.mktemp("runs")
    make_tiny_tokenizer(tmp_path_factory.mktemp("words")).save_pretrained(folder / "tokenizer" / "output")
    return folder


def units(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """(rows, width) random features of unit length."""
    return functional.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_rank_me_is_the_formula_and_counts_dimensions() -> None:
    """Plain loops over the singular values; orthonormal columns use all dimensions, one line uses one."""
    features = torch.randn(20, 7, generator=torch.Generator().manual_seed(0))
    gram = features.double().T @ features.double()
    values = [math.sqrt(max(0.0, float(value))) for value in torch.linalg.eigvalsh(gram)]
    shares = [value / sum(values) + 1e-7 for value in values]
    assert rank_me(features) == pytest.approx(math.exp(-sum(share * math.log(share) for share in shares)), rel=1e-6)
    assert rank_me(torch.linalg.qr(torch.randn(64, 16)).Q) == pytest.approx(16, rel=1e-4)
    assert rank_me(torch.ones(64, 16)) == pytest.approx(1, rel=1e-3)
    assert rank_me(torch.randn(64, 1) @ torch.randn(1, 16)) == pytest.approx(1, rel=1e-3)
    assert rank_me(torch.zeros(64, 16)) == 1.0


def test_alignment_and_uniformity_are_the_formulas() -> None:
    """Pair by pair; all in one point gives 0 and 0; opposite pairs lie 2 apart."""
    first, second = units(9, 5), units(9, 5, seed=1)
    distances = [math.dist(a, b) for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    assert alignment(first, second) == pytest.approx(sum(d**2 for d in distances) / 9, rel=1e-5)
    assert alignment(first, second, alpha=1) == pytest.approx(sum(distances) / 9, rel=1e-5)
    pairs = [math.dist(first[i].tolist(), first[j].tolist()) for i in range(9) for j in range(i)]
    assert uniformity(first) == pytest.approx(math.log(sum(math.exp(-2 * d**2) for d in pairs) / len(pairs)), rel=1e-5)
    same = units(1, 5).expand(9, 5)
    assert alignment(same, same) == 0 and uniformity(same) == 0
    assert alignment(first, -first) == pytest.approx(4, rel=1e-5)
    two = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert uniformity(two) == pytest.approx(-8)
    with pytest.raises(ValueError, match="pairs"):
        uniformity(units(1, 5))


def test_what_was_only_turned_has_not_moved() -> None:
    """Linear CKA is 1 for turned, scaled and shifted features, and equals its definition by centred Gram matrices."""
    features = units(40, 8)
    turned = 3 * features @ torch.linalg.qr(torch.randn(8, 8)).Q + 1
    assert kept_direction(features, turned) == pytest.approx(1, abs=1e-5)
    others = units(40, 6, seed=1)
    centre = torch.eye(40) - 1 / 40
    first, second = (centre @ rows @ rows.T @ centre for rows in (features, others))
    expected = (first * second).sum() / (first.norm() * second.norm())
    assert kept_direction(features, others) == pytest.approx(float(expected), rel=1e-4)
    same = torch.ones(40, 8)
    assert kept_direction(same, same) == 1.0 and kept_direction(features, same) == 0.0


def test_a_look_measures_the_features_of_the_tower_that_comes_out(runs: Path) -> None:
    """DINO's teacher is looked at, not its student; kNN asks every other picture, as done here by hand."""
    set_seed(1)
    objective = build_tower_objective(small_stage("dino", 1), Workshop(runs, None))
    assert isinstance(objective, DinoObjective)
    with torch.no_grad():
        for weight in objective.tower.parameters():
            weight.mul_(2.0)
    monitor = TowerMonitor(Monitor(pictures=48), SIDE, 20, [scenes(48, "pictures", HELD_OUT)])
    with only_looking(objective):
        seen = monitor.measure(objective.watched(16))
        tower, pictures = objective.teacher_tower.model, scenes(48, "pictures", HELD_OUT)
        views = torch.stack([picture.pixels for picture in pictures])
        features = tower(tower.normalise(functional.interpolate(views, (SIDE, SIDE), mode="bilinear", antialias=True)))
    pooled = features.pooled
    kinds = sorted({str(picture.label) for picture in pictures})
    labels = torch.tensor([kinds.index(str(picture.label)) for picture in pictures])
    right = knn_labels(pooled[::2], labels[::2], pooled[1::2], 20) == labels[1::2]
    assert seen["rank"] == pytest.approx(rank_me(pooled), rel=0.01)
    assert seen["knn"] == pytest.approx(float(right.float().mean()), abs=1 / 24)
    assert "drift" not in seen and "zero_shot" not in seen


def test_a_model_that_reads_is_asked_for_its_texts(runs: Path, tmp_path: Path) -> None:
    """SigLIP's looks have zero-shot and retrieval, CLIP's too, and the second look knows how far features moved."""
    for name in ("siglip", "clip"):
        small_run(small_stage(name, 2), runs, tmp_path / name, Monitor(every=1, pictures=48))
        looks = logged(tmp_path / name, "rank")
        assert [look["step"] for look in looks] == [0, 1, 2]
        for look in looks:
            assert {"zero_shot", "picture_to_text", "text_to_picture", "knn", "alignment", "uniformity"} <= look.keys()
        assert "drift" not in looks[0]
        assert 0 < looks[2]["drift"] < 1
        moved = looks[2]["alignment"] - looks[1]["alignment"]
        assert looks[2]["alignment_drift"] == pytest.approx(moved, abs=1e-6)


@pytest.mark.parametrize("name", ["dinov2", "words", pytest.param("simclr", marks=pytest.mark.slow)])
def test_looking_leaves_no_trace(name: str, runs: Path, tmp_path: Path) -> None:
    """Weights after four steps are equal to the bit with and without, resumed too; dinov2 drops paths at random."""
    changes: dict[str, Any] = {"schedule": {"save_every": 2, "batch_size": 8}}
    if name == "simclr":
        changes["backbone"] = {"family": "resnet", "depth": 18, "image_side": 32}
    stage = small_stage(name, 4, **changes)
    small_run(stage, runs, tmp_path / "without")
    small_run(stage, runs, tmp_path / "with", Monitor(every=1, pictures=16))
    assert len(logged(tmp_path / "with", "rank")) == 5
    assert_same_weights(weights_in(tmp_path / "without", 4), weights_in(tmp_path / "with", 4))
    before = logged(tmp_path / "with", "rank")
    newest = tmp_path / "with" / "checkpoints" / "checkpoint-4"
    newest.rename(tmp_path / "put-away")
    small_run(stage, runs, tmp_path / "with", Monitor(every=1, pictures=16))
    assert_same_weights(weights_in(tmp_path / "without", 4), weights_in(tmp_path / "with", 4))
    assert logged(tmp_path / "with", "rank")[5:] == before[3:]  # its last look is a part of the checkpoint


def look_as(rank: int, runs: Path, port: int, steps: int) -> None:
    """What one of two processes does."""
    as_launched(rank, port)
    stage = small_stage("simclr", steps, schedule={"batch_size": 8, "save_every": 1})
    for folder, monitor in (("with", Monitor(every=1, pictures=16)), ("without", None)):
        objective = small_run(stage, runs, runs / folder, monitor)
        torch.save(objective.state_dict(), runs / f"{folder}-{rank}.pt")


def test_the_main_rank_looks_and_nobody_hangs(tmp_path: Path) -> None:
    """Two processes: one line a look, whole checkpoints, and on both the weights of a run that nobody looked at."""
    on_two_ranks(look_as, tmp_path, free_port(), 2)
    assert [look["step"] for look in logged(tmp_path / "with", "rank")] == [0, 1, 2]
    assert len(logged(tmp_path / "with", "eval_loss")) == 1
    first, *others = [torch.load(tmp_path / f"{which}-{rank}.pt") for which in ("with", "without") for rank in (0, 1)]
    for other in others:
        assert_same_weights(first, other)
    assert (tmp_path / "with" / "checkpoints" / "checkpoint-2" / "rng_state_1.pth").is_file()


def test_what_cannot_be_looked_at_is_refused(runs: Path) -> None:
    """Too few pictures, pictures without labels or texts, a stream: said before the first step."""
    few, plain = scenes(4), scenes(16)
    with pytest.raises(DataError, match="8 pictures or more, and there are 4"):
        TowerMonitor(Monitor(), SIDE, 16, [plain], labelled=few)
    with pytest.raises(DataError, match=r"monitor\.pairs: each picture needs a text"):
        TowerMonitor(Monitor(), SIDE, 16, [plain], pairs=plain)
    with pytest.raises(DataError, match=r"monitor\.labelled.*two labels or more"):
        TowerMonitor(Monitor(), SIDE, 16, [plain], labelled=plain[:1] * 9)
    with pytest.raises(ValueError, match="a stream is read once"):
        MonitorSource(tars="a.tar", stream=True)
    assert TowerMonitor(Monitor(), SIDE, 16, [few]).pictures is None


def test_a_recipe_names_what_is_looked_at(runs: Path) -> None:
    """`labelled` and `pairs` are opened as held-out pictures; null looks at nothing; of MAE the patches are read."""
    workshop = Workshop(runs, None)
    stage = small_stage("siglip", 1, monitor={"labelled": {"scenes": 40}, "pairs": {"scenes": 9}})
    monitor = opened_monitor(stage, [scenes(12)], workshop)
    assert monitor is not None and monitor.labelled is not None and monitor.pairs is not None
    assert len(monitor.labelled.labels) == 40 and monitor.labelled.has_labels
    assert len(monitor.pairs.texts) == 9 and monitor.pairs.has_texts
    assert opened_monitor(small_stage("mae", 1, monitor=None), [scenes(12)], workshop) is None
    assert not build_tower_objective(small_stage("mae", 1), workshop).watched(16).pooled
