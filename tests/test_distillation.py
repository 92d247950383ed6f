"""DINO, DINOv2 and MoCo v3 against plain loops, lightly and torch; ranks against one process; what moves."""

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from assistant.towers import ResNetShape, Tower, ViTShape, load_tower, new_tower
from tests.ranks import on_two_ranks
from training import distillation_losses
from training.cached_step import cached_step
from training.data.pictures import Picture
from training.distillation_losses import Centre, crops_loss, koleo_loss, patches_loss, sinkhorn_knopp
from training.gather import mean_over_ranks
from training.heads import PrototypeHead, _UnitRows, mlp_head
from training.objective import Start, total_loss
from training.objectives import dino, dinov2, moco
from training.objectives.dino import DinoObjective
from training.objectives.dinov2 import DinoV2Objective
from training.objectives.moco import MocoObjective, keys_loss
from training.schedules import cosine, warm_up
from training.self_distillation import patch_embedding_names, spread
from training.teacher import Teacher, names_outside_teachers
from training.trainer import freeze_all_but

# lightly is imported where it is needed: the processes of the last test read this file too, and do without it.

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


def scores(*shape: int, seed: int = 0) -> Tensor:
    """Random scores, leaves that want a gradient."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def value_and_gradient(loss: Tensor, leaf: Tensor) -> tuple[Tensor, Tensor]:
    """A loss and its gradient at `leaf`."""
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def assert_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    """Both the value and the gradient, to 1e-5."""
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their.to(our.dtype), **CLOSE)


# --- DINO's loss


def crops_loss_in_loops(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Caron et al. 2021, equation 3 and algorithm 1, pair by pair and sample by sample, in fp64."""
    terms = []
    for target in range(teacher.shape[1]):
        for crop in range(student.shape[1]):
            if crop == target:
                continue
            for sample in range(len(student)):
                probabilities = torch.exp(student[sample, crop].double() / temperature)
                probabilities = probabilities / probabilities.sum()
                terms.append(-(teacher[sample, target].double() * probabilities.log()).sum())
    return torch.stack(terms).mean()


@pytest.mark.parametrize("block", [5, 40, 2**18])
@pytest.mark.parametrize(("teachers", "crops"), [(2, 2), (2, 6), (1, 3), (3, 3), (3, 5)])
def test_crops_loss_is_the_formula(teachers: int, crops: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation_losses, "CPU_BLOCK", block)
    student = scores(4, crops, 11)
    teacher = scores(4, teachers, 11, seed=1).detach().mul(3).softmax(-1)
    ours = value_and_gradient(crops_loss(student, teacher, 0.1), student)
    assert_same(ours, value_and_gradient(crops_loss_in_loops(student, teacher, 0.1), student))


def test_crops_loss_and_centre_are_lightlys() -> None:
    from lightly.loss import DINOLoss

    student, teacher = scores(5, 6, 300), scores(5, 2, 300, seed=1).detach()
    centre, theirs = Centre(300, momentum=0.9), DINOLoss(300, teacher_temp=0.05, student_temp=0.1)
    for _ in range(3):  # the centre is zero at first, and only then something to take off
        ours = value_and_gradient(crops_loss(student, centre.probabilities(teacher, 0.05), 0.1), student)
        lightly = theirs(list(teacher.unbind(1)), list(student.unbind(1)))
        assert_same(ours, value_and_gradient(lightly, student))
        centre.remember(teacher)
        centre.update()
        torch.testing.assert_close(centre.value, theirs.center.flatten(), **CLOSE)


def test_a_centre_that_was_shown_nothing_stays() -> None:
    centre = Centre(3, momentum=0.5)
    centre.remember(torch.tensor([[2.0, 4.0, 6.0], [4.0, 4.0, 0.0]]))
    centre.update()
    centre.update()
    assert centre.value.tolist() == [1.5, 2.0, 1.5]


def test_crops_loss_of_known_cases() -> None:
    uniform = torch.full((2, 2, 8), 1 / 8)
    assert float(crops_loss(torch.zeros(2, 4, 8), uniform, 0.1)) == pytest.approx(math.log(8))
    sure = functional.one_hot(torch.tensor([3]), 8).float().expand(2, 2, 8)
    assert float(crops_loss(sure.repeat(1, 2, 1) * 10, sure, 0.1)) == pytest.approx(0, abs=1e-6)
    student = scores(3, 1, 8).detach().repeat(1, 4, 1).requires_grad_()
    same = student.detach()[:, :2].div(0.1).softmax(-1)
    _, gradient = value_and_gradient(crops_loss(student, same, 0.1), student)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))
    with pytest.raises(ValueError, match="no pair"):
        crops_loss(torch.zeros(2, 1, 8), uniform[:, :1], 0.1)


def test_collapsed_scores_are_centred_away() -> None:
    centre = Centre(6, momentum=0.0)
    collapsed = torch.arange(6.0).expand(4, 6)
    centre.remember(collapsed)
    centre.update()
    torch.testing.assert_close(centre.probabilities(collapsed, 0.04), torch.full((4, 6), 1 / 6))
    torch.testing.assert_close(sinkhorn_knopp(collapsed, 0.04), torch.full((4, 6), 1 / 6))


def test_huge_scores_stay_finite() -> None:
    student = (scores(2, 3, 9).detach() * 1e4).requires_grad_()
    loss, gradient = value_and_gradient(crops_loss(student, torch.full((2, 2, 9), 1 / 9), 0.1), student)
    assert loss.isfinite() and gradient.isfinite().all()


def test_bf16_scores_are_worked_on_in_fp32() -> None:
    student = scores(3, 5, 50).detach().bfloat16().requires_grad_()
    wide = student.detach().float().requires_grad_()
    teacher = scores(3, 2, 50, seed=1).detach().softmax(-1)
    loss, gradient = value_and_gradient(crops_loss(student, teacher, 0.1), student)
    expected, expected_gradient = value_and_gradient(crops_loss(wide, teacher, 0.1), wide)
    torch.testing.assert_close(loss, expected)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient, expected_gradient.bfloat16())


# --- iBOT's loss


def test_patches_loss_is_lightlys_and_the_formula() -> None:
    from lightly.loss import IBOTPatchLoss

    mask = torch.zeros(4, 3, 3, dtype=torch.bool)
    mask[0, 0, :2] = mask[1] = mask[3, 1, 1] = True  # 2, 9, none and 1 hidden
    counts = mask.sum((1, 2))
    student, teacher = scores(int(mask.sum()), 40), scores(int(mask.sum()), 40, seed=1).detach()
    weights = (1 / counts.clamp_min(1) / 4)[:, None].expand(4, 9)[mask.flatten(1)]
    targets = teacher.div(0.05).softmax(-1)
    ours = value_and_gradient(patches_loss(student, targets, weights, 0.1), student)
    theirs = IBOTPatchLoss(40, teacher_temp=0.05, student_temp=0.1)(teacher, student, mask)
    assert_same(ours, value_and_gradient(theirs, student))
    terms, place = [], 0
    for count in counts.tolist():
        logs = student[place : place + count].double().div(0.1).log_softmax(-1)
        terms += [-(targets[place : place + count].double() * logs).sum() / max(count, 1)]
        place += count
    assert_same(ours, value_and_gradient(torch.stack(terms).mean(), student))


def test_no_hidden_patch_costs_nothing() -> None:
    student = scores(0, 5)
    loss, gradient = value_and_gradient(patches_loss(student, torch.empty(0, 5), torch.empty(0), 0.1), student)
    assert float(loss) == 0 and gradient.shape == (0, 5)
    assert sinkhorn_knopp(torch.empty(0, 5), 0.05).shape == (0, 5)


# --- Sinkhorn-Knopp


def sinkhorn_in_loops(scores: Tensor, temperature: float, iterations: int) -> Tensor:
    """The authors' loop (Caron et al. 2020, appendix A; DINOv2's code), entry by entry, in fp64."""
    matrix = torch.exp(scores.double() / temperature).T
    prototypes, samples = matrix.shape
    matrix = matrix / matrix.sum()
    for _ in range(iterations):
        for row in range(prototypes):
            matrix[row] /= matrix[row].sum() * prototypes
        for column in range(samples):
            matrix[:, column] /= matrix[:, column].sum() * samples
    return (matrix * samples).T


@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_is_the_authors_loop(iterations: int) -> None:
    given = scores(9, 5).detach()
    expected = sinkhorn_in_loops(given, 0.3, iterations)
    torch.testing.assert_close(sinkhorn_knopp(given, 0.3, iterations).double(), expected, rtol=1e-5, atol=1e-7)


def test_sinkhorn_is_doubly_stochastic() -> None:
    balanced = sinkhorn_knopp(scores(12, 6).detach(), 0.5, iterations=50)
    torch.testing.assert_close(balanced.sum(1), torch.ones(12))
    torch.testing.assert_close(balanced.sum(0), torch.full((6,), 2.0))
    once = sinkhorn_knopp(scores(12, 6).detach() * 50, 0.04)  # exp of these overflows
    torch.testing.assert_close(once.sum(1), torch.ones(12))


# --- KoLeo


def test_koleo_is_lightlys_and_the_formula() -> None:
    from lightly.loss import KoLeoLoss

    features = scores(7, 10)
    ours = value_and_gradient(koleo_loss(features), features)
    assert_same(ours, value_and_gradient(KoLeoLoss()(features), features))
    units = [row / row.norm() for row in features.double()]
    nearest = [min((one - other).norm() for other in units if other is not one) for one in units]
    assert_same(ours, value_and_gradient(-torch.stack(nearest).log().mean(), features))


def test_koleo_of_known_cases() -> None:
    assert float(koleo_loss(torch.tensor([[3.0, 0.0], [-1.0, 0.0]]))) == pytest.approx(-math.log(2))
    assert float(koleo_loss(torch.eye(4))) == pytest.approx(-math.log(math.sqrt(2)))
    collapsed = torch.ones(3, 4, requires_grad=True)
    loss, gradient = value_and_gradient(koleo_loss(collapsed), collapsed)
    assert 16 < float(loss) < 20 and gradient.isfinite().all()  # -log 1e-8 is 18.4
    with pytest.raises(ValueError, match="two samples"):
        koleo_loss(torch.ones(1, 4))


# --- MoCo's loss


def test_keys_loss_is_the_formula() -> None:
    queries, keys = scores(5, 8), scores(5, 8, seed=1).detach()
    terms = []
    for place, query in enumerate(queries.double()):
        likeness = [query @ key / query.norm() / key.norm() / 0.2 for key in keys.double()]
        terms.append(-(likeness[place] - torch.stack(likeness).logsumexp(0)))
    expected = 2 * 0.2 * torch.stack(terms).mean()
    assert_same(value_and_gradient(keys_loss(queries, keys, 0.2), queries), value_and_gradient(expected, queries))


def test_keys_loss_of_known_cases() -> None:
    collapsed = torch.ones(6, 4)
    assert float(keys_loss(collapsed, collapsed, 0.2)) == pytest.approx(0.4 * math.log(6))
    orthogonal = torch.eye(6)
    expected = 0.4 * math.log(1 + 5 * math.exp(-1 / 0.2))
    assert float(keys_loss(orthogonal * 3, orthogonal, 0.2)) == pytest.approx(expected)
    with pytest.raises(ValueError, match="single sample"):
        keys_loss(torch.ones(1, 4), torch.ones(1, 4), 0.2)


# --- Schedules, heads, teachers


def test_cosine_is_that_of_dino() -> None:
    published = np.array([1.0 + 0.5 * (0.996 - 1.0) * (1 + math.cos(math.pi * i / 40)) for i in np.arange(40)])
    assert [cosine(0.996, 1.0, step, 40) for step in range(40)] == pytest.approx(published)
    assert cosine(0.9, 1.0, 40, 40) == cosine(0.9, 1.0, 99, 40) == 1.0


def test_warm_up_is_a_line_and_then_constant() -> None:
    assert [warm_up(0.04, 0.07, step, 3) for step in range(5)] == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07])
    assert warm_up(0.04, 0.07, 0, 0) == 0.07


@pytest.mark.parametrize("lengths", [False, True])
def test_prototypes_are_weight_normed(lengths: bool) -> None:
    """Against torch's own weight norm, as DINO's code uses it."""
    torch.manual_seed(0)
    head = PrototypeHead(6, prototypes=9, hidden=7, bottleneck=5, layers=2, lengths=lengths)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(5, 9, bias=False))
    normed.parametrizations.weight.original1.data = head.prototypes.detach().clone() * 3  # only directions count
    normed.parametrizations.weight.original0.data.fill_(1)
    if head.lengths is not None:
        head.lengths.data.uniform_(0.5, 2)
        normed.parametrizations.weight.original0.data = head.lengths.detach()[:, None].clone()
    features = torch.randn(4, 3, 6)
    expected = normed(functional.normalize(head.mlp(features), dim=-1))
    torch.testing.assert_close(head(features), expected)


def test_a_head_without_prototypes_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one prototype"):
        PrototypeHead(6, prototypes=0)
    with pytest.raises(ValueError, match="at least 1 layer"):
        mlp_head(4, 4, 4, layers=0)


def test_prototypes_of_unit_length_have_autograds_gradient() -> None:
    """Value and gradient are those of torch's normalize."""
    torch.manual_seed(0)
    rows, weights = torch.randn(7, 5, dtype=torch.float64, requires_grad=True), torch.randn(7, 5, dtype=torch.float64)
    (expected,) = torch.autograd.grad((functional.normalize(rows, dim=-1) * weights).sum(), rows)
    units = _UnitRows.apply(rows)
    torch.testing.assert_close(units, functional.normalize(rows, dim=-1))
    (found,) = torch.autograd.grad((units * weights).sum(), rows)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_mlp_head_is_moco_v3s() -> None:
    """Layers and parameters of `_build_mlp(3, 6, 10, 4)` in the authors' code."""
    head = mlp_head(6, 10, 4, layers=3, last_norm=True)
    assert [p.shape for p in head.parameters()] == [(10, 6), (10,), (10,), (10, 10), (10,), (10,), (4, 10)]
    out = head(torch.randn(64, 6))
    torch.testing.assert_close(out.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var(0, unbiased=False), torch.ones(4), atol=1e-2, rtol=0)


def test_a_teacher_is_the_running_mean_and_never_trains() -> None:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    student.register_buffer("origin", torch.zeros(2))
    teacher = Teacher(student)
    expected = [p.detach().clone() for p in student.parameters()]
    for update in range(4):
        with torch.no_grad():
            for weight in student.parameters():
                weight.add_(torch.randn_like(weight))
            student.get_buffer("origin").fill_(update)
        momentum = 0.5 + update / 10
        expected = [momentum * old + (1 - momentum) * p for old, p in zip(expected, student.parameters(), strict=True)]
        teacher.update(momentum)
        assert teacher.model.get_buffer("origin").tolist() == [update, update]
    torch.testing.assert_close(list(teacher.model.parameters()), [p.detach() for p in expected])
    assert not any(weight.requires_grad for weight in teacher.parameters())
    assert not any(name.startswith("_student") for name in teacher.state_dict())
    teacher.train()
    assert [m.training for m in teacher.model] == [False, False, True]  # no dropout, statistics of the batch
    holder = nn.ModuleDict({"teacher": teacher, "teacher_of_all": student})
    assert names_outside_teachers(holder) == {f"teacher_of_all.{name}" for name, _ in student.named_parameters()}


# --- The objectives

PATCH, SIDE, SMALL_SIDE = 8, 32, 16
Family = Literal["clip", "siglip", "dinov2", "vit"]
FAMILIES: tuple[Family, ...] = ("clip", "siglip", "dinov2", "vit")
CROPS = {"small_side": SMALL_SIDE, "small_count": 3, "prototypes": 24, "head_hidden": 32, "head_layers": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "moco": {"head_hidden": 32, "projection": 16},
    "dino": {**CROPS, "bottleneck": 8},
    "dinov2": {**CROPS, "bottleneck": 8},
}
BUILT_BY = {"moco": moco, "dino": dino, "dinov2": dinov2}
Distilled = MocoObjective | DinoObjective | DinoV2Objective


def tiny_tower(family: Family = "dinov2") -> Tower:
    """A tower of that shape with 16 patches and random weights, always the same.

    Wide ones, so that pictures differ: batch norm divides by their deviation, and would divide roundings as well.
    """
    torch.manual_seed(0)
    tower = new_tower(ViTShape(family=family, width=32, layers=2, heads=2, patch=PATCH, image_side=SIDE))
    with torch.no_grad():
        for weight in tower.parameters():
            if weight.ndim > 1:
                weight.mul_(4)
    return tower


def tiny_objective(name: str, tower: Tower | None = None, side: int = SIDE, **settings: Any) -> Distilled:
    """An objective on a tiny tower, everything that is trained ready to train."""
    module = BUILT_BY[name]
    read = module.Settings.model_validate(SETTINGS[name] | settings)
    start = Start(side=side, tower=tower or tiny_tower())
    torch.manual_seed(1)
    objective: Distilled = module.build(read, start)
    freeze_all_but(objective, objective.trained_parameters())
    return objective.train()


def picture(seed: int) -> Picture:
    """Noise over a gradient of brightness, uint8 (3, 40, 56)."""
    ramp = np.linspace(0, 120, 56, dtype=np.uint8)
    noise = np.random.default_rng(seed).integers(0, 120, (3, 40, 56), dtype=np.uint8)
    return Picture(f"picture {seed}", torch.from_numpy(noise + ramp), texts=())


def samples_of(objective: Distilled, count: int) -> list[Any]:
    """Samples of `count` different pictures."""
    generator = np.random.default_rng(5)
    return [objective.sample(picture(number), generator) for number in range(count)]


def gradients(objective: nn.Module) -> dict[str, Tensor]:
    """Every gradient there is, by the parameter's name."""
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


def take_step(objective: Distilled, optimiser: torch.optim.Optimizer, step: int, steps: int, count: int = 4) -> None:
    """One step as the trainer takes it."""
    objective.begin_step(step, steps)
    optimiser.zero_grad()
    total_loss(objective(**objective.collate(samples_of(objective, count)))).backward()
    objective.before_update(step, steps)
    optimiser.step()
    objective.after_step(step, steps)


def optimiser_of(objective: nn.Module) -> torch.optim.Optimizer:
    """AdamW on what trains."""
    return torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-2)


def weights_of(objective: nn.Module) -> dict[str, Tensor]:
    """A copy of everything that is saved."""
    return {name: value.clone() for name, value in objective.state_dict().items()}


def towers_for(name: str) -> list[Tower]:
    """A tiny tower of each family that the objective takes."""
    towers = [tiny_tower(family) for family in FAMILIES]
    return towers if name == "dinov2" else [*towers, new_tower(ResNetShape(depth=18, image_side=SIDE))]


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_named_trains_and_nothing_else(name: str) -> None:
    for tower in towers_for(name):
        objective = tiny_objective(name, tower)
        before = weights_of(objective)
        take_step(objective, optimiser_of(objective), step=5, steps=10)
        assert set(gradients(objective)) == objective.trained_parameters()
        teachers = {f"{n}." for n, child in objective.named_children() if isinstance(child, Teacher)}
        still = {n for n, _ in objective.named_parameters()} - objective.trained_parameters()
        for parameter in still - {n for n in still if n.startswith(tuple(teachers))}:
            assert torch.equal(objective.get_parameter(parameter), before[parameter]), parameter
        moved = {n for n, p in objective.named_parameters() if not torch.equal(p, before[n])}
        assert {f"tower.{n}" for n in patch_embedding_names(tower)} <= (still if name == "moco" else moved)
        assert any(n.startswith("teacher_tower") for n in moved)


@pytest.mark.parametrize("name", SETTINGS)
def test_teachers_follow_the_schedule(name: str) -> None:
    objective = tiny_objective(name, momentum=0.9)
    optimiser = optimiser_of(objective)
    pairs: list[tuple[str, nn.Module]] = [("teacher_tower", objective.tower)]
    pairs += [("teacher_projector", objective.projector)] if isinstance(objective, MocoObjective) else []
    pairs += [] if isinstance(objective, MocoObjective) else [("teacher_head", objective.head)]
    pairs += [("teacher_patch_head", objective.patch_head)] if isinstance(objective, DinoV2Objective) else []
    expected = {part: [p.detach().clone() for p in student.parameters()] for part, student in pairs}
    for step in range(3):
        take_step(objective, optimiser, step, steps=4)
        momentum = 1 - 0.1 * (1 + math.cos(math.pi * step / 4)) / 2
        for part, student in pairs:
            expected[part] = [
                momentum * old + (1 - momentum) * new.detach()
                for old, new in zip(expected[part], student.parameters(), strict=True)
            ]
    for part, _ in pairs:
        torch.testing.assert_close(list(objective.get_submodule(part).parameters()), expected[part])


@pytest.mark.parametrize("name", SETTINGS)
def test_micro_batches_are_the_whole_batch(name: str) -> None:
    objective = tiny_objective(name, tiny_tower("vit"))
    objective.begin_step(5, 10)
    samples = samples_of(objective, 6)
    values = objective(**objective.collate(samples))
    total_loss(values).backward()
    expected = gradients(objective)
    objective.zero_grad(set_to_none=True)
    in_parts = cached_step(objective, [objective.collate(samples[:4]), objective.collate(samples[4:])])
    torch.testing.assert_close(in_parts, {key: value.detach() for key, value in values.items()}, **CLOSE)
    torch.testing.assert_close(gradients(objective), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_resuming_is_going_on(name: str) -> None:
    objective = tiny_objective(name)
    optimiser = optimiser_of(objective)
    for step in range(2):
        take_step(objective, optimiser, step, steps=4)
    saved, saved_optimiser = weights_of(objective), copy.deepcopy(optimiser.state_dict())
    resumed = tiny_objective(name, tiny_tower())
    resumed.load_state_dict(saved, strict=True)
    other = optimiser_of(resumed)
    other.load_state_dict(saved_optimiser)
    for step in range(2, 4):
        take_step(objective, optimiser, step, steps=4)
        take_step(resumed, other, step, steps=4)
    mine, theirs = objective.state_dict(), resumed.state_dict()
    assert mine.keys() == theirs.keys()
    assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == []


@pytest.mark.parametrize(("name", "published"), [("moco", "tower"), ("dino", "teacher"), ("dinov2", "teacher")])
def test_the_published_tower_is_exported(name: str, published: str, tmp_path: Path) -> None:
    objective = tiny_objective(name)
    take_step(objective, optimiser_of(objective), 0, 4)
    tower = objective.tower if published == "tower" else objective.teacher_tower.model
    objective.export(tmp_path)
    loaded = load_tower(tmp_path)
    torch.testing.assert_close(loaded.state_dict(), tower.state_dict(), rtol=0, atol=0)
    assert not torch.equal(next(loaded.parameters()), next(tiny_tower().parameters()))


@pytest.mark.parametrize("name", SETTINGS)
def test_layers_above_count_down_to_the_heads(name: str) -> None:
    objective = tiny_objective(name)
    above = {n: objective.layers_above(n) for n in objective.trained_parameters()}
    assert {above[n] for n in above if not n.startswith("tower.")} == {0}
    assert {above[n] for n in above if n.startswith("tower.")} == {0, 1, 2, 3}
    assert {above[n] for n in above if "embeddings" in n} == {3}


@pytest.mark.parametrize("name", SETTINGS)
def test_all_chance_comes_from_the_generator(name: str) -> None:
    objective = tiny_objective(name)
    first, second = (objective.collate(samples_of(objective, 3)) for _ in range(2))
    torch.testing.assert_close(dict(first), dict(second), rtol=0, atol=0)
    others: list[Any] = [objective.sample(picture(0), np.random.default_rng(9)) for _ in range(3)]
    again = objective.collate(others)
    assert not any(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("name", ["dino", "dinov2"])
def test_frozen_prototypes_have_no_gradient_at_first(name: str) -> None:
    objective = tiny_objective(name, frozen_prototypes=0.5)
    assert not isinstance(objective, MocoObjective)
    optimiser = optimiser_of(objective)
    for step, is_frozen in enumerate([True, True, False, False]):
        before = objective.head.prototypes.detach().clone()
        take_step(objective, optimiser, step, steps=4)
        assert torch.equal(before, objective.head.prototypes) == is_frozen
        assert (objective.head.prototypes not in optimiser.state) == is_frozen
    assert set(gradients(objective)) == objective.trained_parameters()


def test_the_teacher_is_warmed_up() -> None:
    objective = tiny_objective("dinov2", first_teacher_temperature=0.02, teacher_temperature=0.08, warm_up=0.3)
    assert isinstance(objective, DinoV2Objective)
    seen = []
    for step in range(5):
        objective.begin_step(step, 10)
        seen.append(objective.temperature)
    assert seen == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.08])


def test_moco_is_algorithm_1() -> None:
    """The paper's pseudocode, with torch's cross-entropy and the batch norms' own batches."""
    objective = tiny_objective("moco")
    assert isinstance(objective, MocoObjective)
    batch = objective.collate(samples_of(objective, 4))
    value = objective(**batch)["keys_loss"]
    one, two = (objective.tower.normalise(batch["views"][:, view]) for view in (0, 1))
    units = functional.normalize
    q1, q2 = (units(objective.predictor(objective.projector(objective.tower(x).pooled))) for x in (one, two))
    teacher, projector = objective.teacher_tower.model, objective.teacher_projector.model
    k1, k2 = (units(projector(teacher(x).pooled)) for x in (one, two))
    expected = sum(functional.cross_entropy(q @ k.T / 0.2, torch.arange(4)) * 2 * 0.2 for q, k in ((q1, k2), (q2, k1)))
    torch.testing.assert_close(value, expected, **CLOSE)


def pooled_crops(objective: DinoObjective | DinoV2Objective, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Scores of the student (B, 5, K) of unmasked crops and of the teacher (B, 2, K), a forward for each crop."""
    crops = [*batch["large"].unbind(1), *batch["small"].unbind(1)]
    student = [objective.head(objective.tower(objective.tower.normalise(crop)).pooled) for crop in crops]
    teacher = objective.teacher_tower.model
    scores = [objective.teacher_head.model(teacher(teacher.normalise(crop)).pooled) for crop in crops[:2]]
    return torch.stack(student, dim=1), torch.stack(scores, dim=1)


def test_dino_is_lightlys_step_after_step() -> None:
    from lightly.loss import DINOLoss

    objective = tiny_objective("dino")
    assert isinstance(objective, DinoObjective)
    theirs, optimiser = DINOLoss(24, teacher_temp=0.04, student_temp=0.1), optimiser_of(objective)
    batch = objective.collate(samples_of(objective, 4))
    for step in range(3):
        student, teacher = pooled_crops(objective, batch)
        expected = theirs(list(teacher.unbind(1)), list(student.unbind(1)))
        objective.begin_step(step, 3)
        torch.testing.assert_close(objective(**batch)["crops_loss"], expected, **CLOSE)
        take_step(objective, optimiser, step, 3)
        torch.testing.assert_close(objective.centre.value, theirs.center.flatten(), **CLOSE)


@pytest.mark.parametrize("name", ["dino", "dinov2"])
def test_koleo_is_added_for_the_large_crops_and_only_where_it_has_a_weight(name: str) -> None:
    from lightly.loss import KoLeoLoss

    without = tiny_objective(name, koleo_weight=0)
    batch = without.collate(samples_of(without, 4))
    assert "koleo_loss" not in without(**batch)
    objective = tiny_objective(name, koleo_weight=0.3)
    assert isinstance(objective, DinoObjective | DinoV2Objective)
    pooled = objective.represent(**batch)["student"]
    expected = 0.3 * sum(KoLeoLoss()(crops) for crops in pooled.unbind(1)[:2])
    torch.testing.assert_close(objective(**batch)["koleo_loss"], expected, **CLOSE)


@pytest.mark.parametrize("name", ["dino", "dinov2"])
def test_one_sample_has_no_neighbour_in_training_and_is_passed_over_where_it_is_only_looked_at(name: str) -> None:
    """Held-out samples that a batch leaves over must not end a run of hours."""
    objective = tiny_objective(name, koleo_weight=0.1)
    batch = objective.collate(samples_of(objective, 1))
    with pytest.raises(ValueError, match="one has no neighbour; raise the batch size"):
        objective(**batch)
    assert "koleo_loss" not in objective.eval()(**batch)


@pytest.mark.parametrize("separate", [False, True])
def test_dinov2_is_the_sum_of_its_formulas(separate: bool) -> None:
    """Loops and lightly's KoLeo on the outputs of the tower, crop by crop and patch by patch."""
    from lightly.loss import KoLeoLoss

    objective = tiny_objective("dinov2", separate_patch_head=separate, patches_weight=0.5)
    assert isinstance(objective, DinoV2Objective)
    batch = objective.collate(samples_of(objective, 4))
    hidden = batch["hidden"]
    assert 0 < int(hidden.any(-1).sum()) < 8  # some are masked, some are not
    teacher_head = objective.teacher_patch_head if separate else objective.teacher_head
    head = objective.patch_head if separate else objective.head
    token = objective.tower.own_mask_token()
    _, teacher_scores = pooled_crops(objective, batch)
    student, pooled, patches, targets = [], [], [], []
    for view in (0, 1):
        pixels = objective.tower.normalise(batch["large"][:, view])
        seen = objective.tower(pixels, hidden=hidden[:, view], mask_token=token)
        pooled.append(seen.pooled)
        student.append(objective.head(seen.pooled))
        patches.append(head(seen.patches))
        targets.append(teacher_head.model(objective.teacher_tower.model(pixels).patches))
    student += [objective.head(objective.tower(objective.tower.normalise(x)).pooled) for x in batch["small"].unbind(1)]
    balanced = sinkhorn_in_loops(teacher_scores.detach().flatten(0, 1), 0.04, 3).view(4, 2, 24)
    koleo = sum(KoLeoLoss()(part) for part in pooled)
    all_patches, all_targets = torch.stack(patches, 1), torch.stack(targets, 1).detach()
    target_of_hidden = sinkhorn_in_loops(all_targets[hidden], 0.04, 3)
    terms = -(target_of_hidden * all_patches[hidden].double().div(0.1).log_softmax(-1)).sum(-1)
    owner = hidden.flatten(0, 1).nonzero()[:, 0]
    per_crop = torch.stack(
        [terms[owner == crop].mean() if (owner == crop).any() else terms.sum() * 0 for crop in range(8)]
    )
    values = objective(**batch)
    expected = {
        "crops_loss": crops_loss_in_loops(torch.stack(student, dim=1), balanced, 0.1).float(),
        "patches_loss": 0.5 * per_crop.mean().float(),
        "koleo_loss": 0.1 * koleo,
    }
    torch.testing.assert_close({key: values[key] for key in expected}, expected, **CLOSE)


def test_the_student_does_not_see_hidden_patches() -> None:
    objective = tiny_objective("dinov2", masked_crops=1.0)
    assert isinstance(objective, DinoV2Objective)
    batch = dict(objective.collate(samples_of(objective, 2)))
    places = (
        functional.interpolate(batch["hidden"].view(4, 1, 4, 4).float(), scale_factor=PATCH)
        .bool()
        .view(2, 2, 1, 32, 32)
    )
    before = objective.represent(**batch)
    batch["large"] = torch.where(places, 255 - batch["large"], batch["large"])
    after = objective.represent(**batch)
    torch.testing.assert_close(after["student"], before["student"])
    torch.testing.assert_close(after["student_patches"], before["student_patches"])
    assert not torch.allclose(after["teacher_patches"], before["teacher_patches"])


def test_masks_are_as_many_and_as_large_as_the_settings_say() -> None:
    objective = tiny_objective("dinov2", masked=(0.2, 0.4))
    counts = torch.stack([sample.hidden.sum(-1) for sample in samples_of(objective, 100)]).flatten()
    assert 70 < int((counts > 0).sum()) < 130  # of 200; three deviations are 21
    assert set(counts.tolist()) <= {0, 3, 4, 5, 6}


def test_a_step_without_masked_crops_is_a_step() -> None:
    objective = tiny_objective("dinov2")
    batch = dict(objective.collate(samples_of(objective, 2)))
    batch["hidden"] = torch.zeros_like(batch["hidden"])
    values = objective(**batch)
    total_loss(values).backward()
    assert float(values["patches_loss"].detach()) == 0
    assert set(gradients(objective)) == objective.trained_parameters()  # or ranks would wait for each other


@pytest.mark.parametrize("name", SETTINGS)
def test_in_bf16_the_loss_is_nearly_the_same(name: str) -> None:
    objective = tiny_objective(name)
    batch = objective.collate(samples_of(objective, 4))
    expected = total_loss(objective(**batch)).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = total_loss(objective(**batch))
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), expected, rtol=0.05, atol=0.05)


def test_spread_tells_a_collapse() -> None:
    assert float(spread(torch.ones(8, 16))) == pytest.approx(0, abs=1e-5)
    assert float(spread(scores(500, 16))) == pytest.approx(1, abs=0.02)


# --- What does not fit is refused


@pytest.mark.parametrize(
    ("name", "settings", "side", "message"),
    [
        ("dino", {"small_side": 20}, SIDE, "small_side: a view of 20 pixels.*such as small_side: 16"),
        ("dino", {"small_side": 40}, SIDE, "small crop of 40 pixels is larger than a large one of 32"),
        ("dino", {}, 36, "side: a view of 36 pixels"),
        ("moco", {}, 36, "side: a view of 36 pixels"),
        ("dinov2", {"masked": (0.01, 0.5)}, SIDE, "0.01 of 16 patches is none"),
        ("dinov2", {"masked": (0.5, 0.1)}, SIDE, "not two rising shares"),
        ("dino", {"large_area": (0.5, 1.5)}, SIDE, "not two rising shares"),
        ("dino", {"prototypes": 0}, SIDE, "prototypes"),
        ("dino", {"student_temperature": 0.0}, SIDE, "student_temperature"),
        ("dino", {"teacher_temperature": 1.1}, SIDE, "teacher_temperature"),
        ("moco", {"temperature": -1}, SIDE, "temperature"),
        ("moco", {"queue": 65536}, SIDE, "queue"),
    ],
)
def test_settings_that_do_not_fit_are_refused(name: str, settings: dict[str, Any], side: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_objective(name, side=side, **settings)


def test_towers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="no patch tokens"):
        tiny_objective("dinov2", new_tower(ResNetShape(depth=18, image_side=SIDE)))
    for name in SETTINGS:
        with pytest.raises(ValueError, match=f"{name} trains a tower alone"):
            BUILT_BY[name].build(BUILT_BY[name].Settings(), Start(side=SIDE))


def test_no_small_crops_are_no_error() -> None:
    objective = tiny_objective("dino", small_count=0)
    values = objective(**objective.collate(samples_of(objective, 2)))
    assert values["crops_loss"].isfinite()


# --- Two ranks are one process with the joined batch


def two_steps(objective: Distilled, model: nn.Module, samples: Sequence[Any]) -> list[dict[str, Tensor]]:
    """For each of two steps of plain gradient descent: losses, then gradients; at last everything that is saved."""
    optimiser = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=1e-3)
    found = []
    for step in range(2):
        objective.begin_step(step + 2, 4)
        optimiser.zero_grad()
        values = model(**objective.collate(samples))
        total_loss(values).backward()
        found.append({name: mean_over_ranks(value) for name, value in values.items() if name.endswith("_loss")})
        found.append(gradients(objective))
        optimiser.step()
        objective.after_step(step + 2, 4)
    return [*found, weights_of(objective)]


def on_one_rank(rank: int, folder: str) -> None:
    """What each of two processes does: its half of the samples, under DistributedDataParallel."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    for name in SETTINGS:
        objective = tiny_objective(name, tiny_tower("vit"))
        half = samples_of(objective, 6)[3 * rank : 3 * rank + 3]
        torch.save(two_steps(objective, DistributedDataParallel(objective), half), f"{folder}/{name}-{rank}.pt")
    distributed.destroy_process_group()


def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    """Losses and gradients, the second step after a step of centres, batch norms and teachers, and all that is saved.

    The tower rounds three pictures otherwise than six, so what is small beside its tensor's largest value may differ
    more; at the second step those roundings went through a step of training.
    """
    on_two_ranks(on_one_rank, str(tmp_path))
    for name in SETTINGS:
        objective = tiny_objective(name, tiny_tower("vit"))
        expected = two_steps(objective, objective, samples_of(objective, 6))
        first, second = (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in (0, 1))
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        for stage, (found, wanted) in enumerate(zip(first, expected, strict=True)):
            assert found.keys() == wanted.keys()
            for key, value in wanted.items():
                largest = float(value.abs().max()) if value.numel() else 0.0
                error = float((found[key] - value).abs().max()) if value.numel() else 0.0
                assert error <= (1e-5 if stage < 2 else 1e-3) * largest + 3e-6, (name, stage, key, error, largest)
