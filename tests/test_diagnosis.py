"""Runs that go wrong on purpose are told so, each in its own words and once; runs that go well hear nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from assistant.tower_families import TowerOutput
from tests.small_runs import diagnoses, logged, small_run, small_stage
from tests.test_pretraining import CASES
from tests.tiny import make_tiny_tokenizer
from training.config import Monitor
from training.diagnosis import Expected, diagnose
from training.objective import Objective
from training.objectives.dino import DinoObjective
from training.objectives.simclr import SimclrObjective
from training.run_log import Line

LOOKS = Monitor(every=5, pictures=48)
# What differs from the tiny stage where it is to learn something within 60 steps, and the steps of its grace: SigLIP
# stands at ln B + 1 for its first hundred.
HEALTHY: dict[str, tuple[dict[str, Any], float, int]] = {
    "simclr": ({"temperature": 0.5, "strength": 0.5, "smallest_crop": 0.3}, 3e-4, 0),
    "siglip": ({}, 1e-3, 300),
    "dino": ({}, 1e-3, 0),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs that holds a finished tokenizer."""
    folder = tmp_path_factory.mktemp("runs")
    make_tiny_tokenizer(tmp_path_factory.mktemp("words")).save_pretrained(folder / "tokenizer" / "output")
    return folder


class OnlyAttracts(SimclrObjective):
    """SimCLR of the tower's own output with the negatives taken out: views of a picture attract each other."""

    def compare(self, representations: dict[str, Tensor]) -> dict[str, Tensor]:
        """The squared distance of the two views, which is 0 where all pictures are one point."""
        first, second = functional.normalize(representations["pooled"], dim=-1).unbind(1)
        return {"nt_xent_loss": 10 * (first - second).square().sum(-1).mean()}


def onto_a_line(objective: Objective) -> None:
    """From its fifth run on, let the tower tell pictures apart by their brightness, along one direction."""
    assert isinstance(objective, SimclrObjective)
    direction = functional.normalize(torch.ones(objective.tower.width), dim=0)
    shift = torch.linspace(-1, 1, objective.tower.width)
    calls = [0]

    def flatten(tower: Any, given: Any, output: TowerOutput) -> TowerOutput:
        calls[0] += 1
        if calls[0] < 5:
            return output
        brightness = given[0].mean((1, 2, 3))[:, None]
        pooled = shift + brightness * direction + 0.0 * output.pooled
        return TowerOutput(output.patches, pooled)

    objective.tower.register_forward_hook(flatten)


def never_centre(objective: Objective) -> None:
    """DINO's centre stays where it is, and that favours one prototype (a cosine is 1 at most).

    From a centre of zero it depends on the last bits of the machine whether 40 steps are enough to fall.
    """
    assert isinstance(objective, DinoObjective)
    objective.centre.value[0] = -3.0
    objective.centre.update = lambda: None  # type: ignore[method-assign]


def attract_only(objective: Objective) -> None:
    """SimCLR without negatives."""
    objective.__class__ = OnlyAttracts


def test_a_tower_that_maps_all_to_one_point_is_told(tmp_path: Path) -> None:
    stage = small_stage("simclr", 30, schedule={"learning_rate": 3e-3})
    small_run(stage, tmp_path, tmp_path / "run", LOOKS, attract_only)
    assert diagnoses(tmp_path / "run") == ["one_point"]
    (line,) = logged(tmp_path / "run", "diagnosis")
    assert line["words"].startswith("Collapse to one point") and "lower learning_rate" in line["words"]


def test_a_tower_on_a_line_is_told(tmp_path: Path) -> None:
    small_run(small_stage("simclr", 15), tmp_path, tmp_path / "run", LOOKS, onto_a_line)
    assert diagnoses(tmp_path / "run")[0] == "few_directions"
    assert "one_point" not in diagnoses(tmp_path / "run")
    assert "along 1." in logged(tmp_path / "run", "diagnosis")[0]["words"]


def test_dino_without_centring_is_told(tmp_path: Path) -> None:
    small_run(small_stage("dino", 40), tmp_path, tmp_path / "run", LOOKS, never_centre)
    assert diagnoses(tmp_path / "run") == ["one_prototype"]
    assert "centring" in logged(tmp_path / "run", "diagnosis")[0]["words"]


def test_dino_without_sharpening_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.diagnosis.GRACE_STEPS", 10)
    settings = CASES["dino"][0] | {"first_teacher_temperature": 1.0, "teacher_temperature": 1.0}
    small_run(small_stage("dino", 40, settings=settings), tmp_path, tmp_path / "run", LOOKS)
    assert diagnoses(tmp_path / "run") == ["uniform_teacher"]
    assert "teacher_temperature" in logged(tmp_path / "run", "diagnosis")[0]["words"]


def expected(**changes: Any) -> Expected:
    """A run of 4000 steps of 64 samples."""
    known: dict[str, Any] = {"steps": 4000, "samples": 64, "untaught": {}, "largest": {}}
    return Expected(**(known | changes))


def lines_of(name: str, values: list[float], **others: list[float]) -> list[Line]:
    """A log line for every 160th step with each of the values."""
    columns = {name: values, **others}
    return [{"step": 160 * (n + 1)} | {key: column[n] for key, column in columns.items()} for n in range(len(values))]


def kinds(lines: list[Line], known: Expected) -> list[str]:
    return [finding.kind for finding in diagnose(lines, known)]


def test_a_loss_that_stays_at_the_log_of_the_batch_is_told() -> None:
    """ln 64 = 4.159, after a quarter of the run and 300 steps; one that fell, or finds more than at first, is not."""
    known = expected(untaught={"clip_loss": 4.159}, finds=("finds",))
    stuck = lines_of("clip_loss", [4.3] + [4.16] * 14, finds=[1 / 64] * 15)
    assert kinds(stuck, known) == ["stuck"]
    assert "clip_loss is 4.160, and one who cannot tell the 64 samples" in diagnose(stuck, known)[0].words
    assert kinds(stuck[:8], known) == []  # too early
    assert kinds(lines_of("clip_loss", [4.3] + [4.16] * 9 + [4.0] * 5, finds=[1 / 64] * 15), known) == []
    # Several texts are true of a picture: the loss is higher, and yet it learns.
    assert kinds(lines_of("clip_loss", [9.0] * 15, finds=[0.1] * 5 + [0.4] * 10), known) == []
    assert kinds(stuck, expected(untaught={"keys_loss": 4.0})) == []


def test_siglip_that_cannot_learn_is_told(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real run whose rate is so small that nothing moves; its loss stays where it began, far above ln B + 1."""
    monkeypatch.setattr("training.diagnosis.GRACE_STEPS", 10)
    stage = small_stage("siglip", 24, schedule={"learning_rate": 1e-9})
    small_run(stage, runs, tmp_path / "run", LOOKS)
    assert diagnoses(tmp_path / "run") == ["stuck"]


def test_a_temperature_at_its_clamp_is_told() -> None:
    """One that grew there; a published CLIP begins there."""
    known = expected(largest={"scale": 100.0})
    assert kinds(lines_of("scale", [14.0, 60.0] + [100.0] * 5), known) == ["at_limit"]
    assert kinds(lines_of("scale", [100.0] * 9), known) == []
    assert kinds(lines_of("scale", [14.0, 60.0] + [100.0] * 4), known) == []


def test_a_gradient_of_zero_or_out_of_bounds_is_told() -> None:
    """Zero five times, or 50 times the median three times; a start that is steep, and one outlier, are neither."""
    assert kinds(lines_of("grad_norm", [1.0] * 5 + [0.0] * 5), expected()) == ["no_gradient"]
    assert kinds(lines_of("grad_norm", [1.0] * 5 + [0.0] * 4), expected()) == []
    assert kinds(lines_of("grad_norm", [2.0] * 12 + [150.0] * 3), expected()) == ["gradient_explodes"]
    assert kinds(lines_of("grad_norm", [2.0] * 12 + [150.0, 2.0, 150.0]), expected()) == []
    assert kinds(lines_of("grad_norm", [900.0, 300.0, 50.0] + [2.0] * 20), expected()) == []


def test_features_that_are_not_numbers_are_told(tmp_path: Path) -> None:
    """A look through spoiled weights measures nothing else."""

    def spoil(objective: Objective) -> None:
        assert isinstance(objective, SimclrObjective)
        with torch.no_grad():
            next(objective.tower.parameters()).fill_(float("nan"))

    stage = small_stage("simclr", 1, schedule={"on_nan": "skip"})
    small_run(stage, tmp_path, tmp_path / "run", LOOKS, spoil)
    assert diagnoses(tmp_path / "run") == ["not_finite"]
    assert logged(tmp_path / "run", "rank") == []


def test_what_was_said_is_not_said_again_after_a_resume(tmp_path: Path) -> None:
    """A run that went on from its checkpoint knows what its log has."""
    stage = small_stage("dino", 40, schedule={"save_every": 36})
    small_run(stage, tmp_path, tmp_path / "run", LOOKS, never_centre)
    assert diagnoses(tmp_path / "run") == ["one_prototype"]
    (tmp_path / "run" / "checkpoints" / "checkpoint-40").rename(tmp_path / "put-away")
    small_run(stage, tmp_path, tmp_path / "run", LOOKS, never_centre)
    assert diagnoses(tmp_path / "run") == ["one_prototype"]
    assert [line["step"] for line in logged(tmp_path / "run", "loss")][-3:] == [40, 38, 40]


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_hears_nothing(name: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short real runs on generated scenes, judged as strictly as a long one; each learns something."""
    settings, rate, grace = HEALTHY[name]
    monkeypatch.setattr("training.diagnosis.GRACE_STEPS", grace)
    stage = small_stage(name, 60, settings=CASES[name][0] | settings, schedule={"learning_rate": rate})
    small_run(stage, runs, tmp_path / "run", LOOKS)
    assert diagnoses(tmp_path / "run") == []
    assert len(logged(tmp_path / "run", "rank")) == 13
