"""Contrastive losses and objectives against loops, lightly, open_clip, transformers, and two processes against one."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoProcessor, CLIPModel, PreTrainedTokenizerFast, SiglipModel

from assistant.embeddings import load_embedder, text_ids
from assistant.tower_shapes import new_image_processor
from assistant.towers import ResNetShape, TextShape, ViTShape, clip_tokenizer, load_tower, new_pair, new_tower
from tests.ranks import RANKS, on_two_ranks
from tests.tiny import make_tiny_tokenizer
from training import contrastive_losses
from training import sigmoid_loss as sigmoid_module
from training.cached_step import cached_step
from training.comparison import share_found
from training.contrastive_losses import clip_loss, nt_xent_loss
from training.data.pictures import DataError, Picture
from training.gather import (
    exchange_with_neighbour,
    gather,
    gather_with_gradient,
    mean_over_ranks,
    others_of,
    rank,
    ranks,
    sum_over_ranks,
)
from training.objective import Start, total_loss
from training.objectives import clip, siglip, simclr
from training.objectives.clip import ClipObjective
from training.objectives.siglip import SiglipObjective
from training.objectives.simclr import SimclrObjective
from training.picture_text import identity_of
from training.sigmoid_loss import sigmoid_loss
from training.trainer import freeze_all_but

NAMES = ("clip", "siglip", "simclr")
SIDE, PATCH, WIDTH, LENGTH = 32, 8, 32, 20
TEXTS = ("a red circle", "a blue square", "a red circle", "two green stars on white", "a dog", "left of a cat")


def units(count: int, width: int = 16, seed: int = 0) -> Tensor:
    """(count, width) random points of unit length."""
    return functional.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def value_and_gradients(loss: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The loss of `inputs` and the gradient of each."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def assert_same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Each equal to 1e-5."""
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their.to(our.dtype), rtol=1e-5, atol=1e-5)


# ---- the formulas in plain loops ----


def nt_xent_in_loops(views: Tensor, temperature: float) -> float:
    """Chen et al. 2020, equation 1: views (2B, D), the two of a picture B rows apart."""
    count = len(views)
    total = 0.0
    for i in range(count):
        cosines = [float(functional.cosine_similarity(views[i], views[j], dim=0)) for j in range(count)]
        others = sum(math.exp(cosines[j] / temperature) for j in range(count) if j != i)
        total -= math.log(math.exp(cosines[(i + count // 2) % count] / temperature) / others)
    return total / count


def clip_in_loops(logits: Sequence[Sequence[float]], same: Sequence[Sequence[bool]]) -> float:
    """Both cross-entropies of Radford et al. 2021, figure 3, a target spread evenly over what is true."""
    total = 0.0
    for row, true in ((logits, same), (list(zip(*logits, strict=True)), list(zip(*same, strict=True)))):
        for scores, is_true in zip(row, true, strict=True):
            normaliser = math.log(sum(math.exp(score) for score in scores))
            right = [score for score, t in zip(scores, is_true, strict=True) if t]
            total += normaliser - sum(right) / len(right)
    return total / (2 * len(logits))


def sigmoid_in_loops(logits: Sequence[Sequence[float]], same: Sequence[Sequence[bool]]) -> float:
    """Zhai et al. 2023, equation 1."""
    total = 0.0
    for scores, is_true in zip(logits, same, strict=True):
        for score, true in zip(scores, is_true, strict=True):
            total += math.log(1 + math.exp(-score if true else score))
    return total / len(logits)


REPEATED = torch.tensor([3, 5, 3, 7, 5, 3, 9])


@pytest.mark.parametrize("temperature", [0.5, 0.1])
def test_nt_xent_is_the_formula(temperature: float) -> None:
    views = torch.randn(10, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = nt_xent_loss(views[:5].float(), views[5:].float(), temperature)
    assert float(ours) == pytest.approx(nt_xent_in_loops(views, temperature), rel=1e-5)


@pytest.mark.parametrize("repeated", [False, True])
def test_clip_and_sigmoid_loss_are_the_formulas(repeated: bool) -> None:
    """With texts that repeat, pairs beside the diagonal are true as well."""
    pictures, texts = units(7, seed=1), units(7, seed=2)
    identity = REPEATED if repeated else torch.arange(7)
    same = (identity[:, None] == identity).tolist()
    cosines = (pictures.double() @ texts.double().T).tolist()
    ours = clip_loss(pictures, texts, torch.tensor(14.3), identity)
    assert float(ours) == pytest.approx(clip_in_loops([[14.3 * c for c in row] for row in cosines], same), rel=1e-5)
    ours = sigmoid_loss(pictures, texts, torch.tensor(10.0), torch.tensor(-10.0), identity)
    theirs = sigmoid_in_loops([[10 * c - 10 for c in row] for row in cosines], same)
    assert float(ours) == pytest.approx(theirs, rel=1e-5)


# ---- other people's code ----


def lightlys(temperature: float) -> Callable[..., Tensor]:
    """lightly's NT-Xent. Imported here and not above: the processes of the last tests import this file too."""
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature)


def open_clips(name: str) -> Callable[..., Tensor]:
    """open_clip's loss of that name, for one process."""
    from open_clip import loss

    return getattr(loss, name)()


@pytest.mark.parametrize("temperature", [0.5, 0.1, 0.01])
def test_nt_xent_is_lightlys(temperature: float) -> None:
    first, second = 3 * units(33, seed=1), 2 * units(33, seed=2)
    ours = value_and_gradients(lambda x, y: nt_xent_loss(x, y, temperature), first, second)
    assert_same(ours, value_and_gradients(lightlys(temperature), first, second))


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_clip_loss_is_open_clips(scale: float) -> None:
    inputs = (units(33, seed=1), units(33, seed=2), torch.tensor(scale))
    assert_same(value_and_gradients(clip_loss, *inputs), value_and_gradients(open_clips("ClipLoss"), *inputs))


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (117.0, -16.0)])
def test_sigmoid_loss_is_open_clips(scale: float, bias: float) -> None:
    inputs = (units(33, seed=1), units(33, seed=2), torch.tensor([scale]), torch.tensor([bias]))
    assert_same(value_and_gradients(sigmoid_loss, *inputs), value_and_gradients(open_clips("SigLipLoss"), *inputs))


def clip_by_autograd(pictures: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """The loss of repeated texts by torch's own log-softmax."""
    logits = scale * pictures @ texts.T
    same = REPEATED[:, None] == REPEATED
    target = same / same.sum(1, keepdim=True)
    return -((target * logits.log_softmax(1)).sum() + (target * logits.T.log_softmax(1)).sum()) / (2 * len(logits))


def sigmoid_by_autograd(pictures: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The loss of repeated texts by torch's own log-sigmoid."""
    signs = torch.where(REPEATED[:, None] == REPEATED, 1.0, -1.0)
    return -functional.logsigmoid(signs * (scale * pictures @ texts.T + bias)).sum() / len(pictures)


def test_gradients_of_repeated_texts_are_autograds() -> None:
    inputs = (units(7, seed=1), units(7, seed=2), torch.tensor(9.0), torch.tensor(-3.0))
    ours = value_and_gradients(lambda x, y, s: clip_loss(x, y, s, REPEATED), *inputs[:3])
    assert_same(ours, value_and_gradients(clip_by_autograd, *inputs[:3]))
    ours = value_and_gradients(lambda x, y, s, b: sigmoid_loss(x, y, s, b, REPEATED), *inputs)
    assert_same(ours, value_and_gradients(sigmoid_by_autograd, *inputs))


# ---- what can be said without computing ----


def test_orthogonal_embeddings() -> None:
    """Pairs agree wholly and nothing else at all."""
    axes = torch.eye(6)
    assert float(nt_xent_loss(axes, axes, 0.5)) == pytest.approx(math.log(math.exp(2) + 10) - 2, rel=1e-5)
    assert float(clip_loss(axes, axes, torch.tensor(5.0))) == pytest.approx(math.log(math.exp(5) + 5) - 5, rel=1e-5)
    expected = math.log(1 + math.exp(2 - 4)) + 5 * math.log(1 + math.exp(-2))
    assert float(sigmoid_loss(axes, axes, torch.tensor(4.0), torch.tensor(-2.0))) == pytest.approx(expected, rel=1e-5)


def test_collapsed_embeddings() -> None:
    """All the same: every answer is as good, and nothing says where to go."""
    same = units(1).repeat(6, 1)
    value, *gradients = value_and_gradients(lambda x, y: nt_xent_loss(x, y, 0.1), same, same)
    assert float(value) == pytest.approx(math.log(11), rel=1e-5)
    assert all(float(gradient.abs().max()) < 1e-6 for gradient in gradients)
    value, *gradients = value_and_gradients(clip_loss, same, same, torch.tensor(20.0))
    assert float(value) == pytest.approx(math.log(6), rel=1e-5)
    assert all(float(gradient.abs().max()) < 1e-5 for gradient in gradients)
    expected = math.log(1 + math.exp(2 - 4)) + 5 * math.log(1 + math.exp(4 - 2))
    ours = sigmoid_loss(same, same, torch.tensor(4.0), torch.tensor(-2.0))
    assert float(ours) == pytest.approx(expected, rel=1e-5)


def test_opposite_embeddings_do_not_underflow() -> None:
    """At scale 100 each right logit is -100: exp of the difference to any bound is 0 in fp32."""
    pictures = units(1).repeat(5, 1)
    value, *gradients = value_and_gradients(clip_loss, pictures, -pictures, torch.tensor(100.0))
    assert float(value) == pytest.approx(math.log(5), rel=1e-4)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


# ---- how it is computed ----


@pytest.mark.parametrize("block", [1, 50, 130, 2**20])
@pytest.mark.parametrize("kept", [0, 2**28])
def test_blocks_of_any_size_are_the_same(block: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive_losses, "CPU_BLOCK", block)
    monkeypatch.setattr(contrastive_losses, "MOST_KEPT", kept)
    monkeypatch.setattr(sigmoid_module, "CPU_BLOCK", block)
    first, second, scale, bias = units(13, seed=1), units(13, seed=2), torch.tensor(10.0), torch.tensor(-10.0)
    ours = value_and_gradients(lambda x, y: nt_xent_loss(x, y, 0.2), first, second)
    assert_same(ours, value_and_gradients(lightlys(0.2), first, second))
    ours = value_and_gradients(clip_loss, first, second, scale)
    assert_same(ours, value_and_gradients(open_clips("ClipLoss"), first, second, scale))
    ours = value_and_gradients(sigmoid_loss, first, second, scale, bias)
    assert_same(ours, value_and_gradients(open_clips("SigLipLoss"), first, second, scale, bias))


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any tensor had which an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.untyped_storage().nbytes() // one.element_size())
        return result


def test_no_matrix_of_all_pairs_is_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is kept, the largest tensor is the embeddings or a block."""
    count, block = 512, 2**14
    for module in (contrastive_losses, sigmoid_module):
        monkeypatch.setattr(module, "CPU_BLOCK", block)
    monkeypatch.setattr(contrastive_losses, "MOST_KEPT", 0)
    pictures, texts = units(count, seed=1).requires_grad_(), units(count, seed=2).requires_grad_()
    scale, bias = torch.tensor(10.0), torch.tensor(-10.0)
    for loss, most in (
        (lambda: nt_xent_loss(pictures, texts, 0.1), 2 * block),
        (lambda: clip_loss(pictures, texts, scale), block),
        (lambda: sigmoid_loss(pictures, texts, scale, bias), block),
    ):
        with LargestTensor() as largest:
            loss().backward()
        assert block // 2 < largest.elements <= most < count**2


@pytest.mark.parametrize("name", ["nt_xent", "clip", "sigmoid"])
def test_narrow_embeddings_are_compared_in_fp32(name: str) -> None:
    """bf16 in, also under autocast: the value and the gradient are those of the same numbers in fp32."""
    losses: dict[str, Callable[..., Tensor]] = {
        "nt_xent": lambda x, y: nt_xent_loss(x, y, 0.1),
        "clip": lambda x, y: clip_loss(x, y, torch.tensor(20.0)),
        "sigmoid": lambda x, y: sigmoid_loss(x, y, torch.tensor(20.0), torch.tensor(-5.0)),
    }
    first, second = units(9, seed=1).bfloat16(), units(9, seed=2).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        ours = value_and_gradients(losses[name], first, second)
    theirs = value_and_gradients(losses[name], first.float(), second.float())
    assert ours[0].dtype == torch.float32 and ours[1].dtype == torch.bfloat16
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours[1].float(), theirs[1], rtol=1e-2, atol=1e-5)


def test_there_is_no_second_derivative() -> None:
    """Asking for it is an error, not a wrong answer."""
    first, second = units(4, seed=1).requires_grad_(), units(4, seed=2).requires_grad_()
    scale, bias = torch.tensor(10.0), torch.tensor(-10.0)
    for loss in (
        nt_xent_loss(first, second, 0.5),
        clip_loss(first, second, scale),
        sigmoid_loss(first, second, scale, bias),
    ):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss, first, create_graph=True)


def test_a_temperature_out_of_range_is_refused() -> None:
    pictures, texts = units(4, seed=1), units(4, seed=2)
    with pytest.raises(ValueError, match="must be above 0"):
        nt_xent_loss(pictures, texts, 0.0)
    with pytest.raises(ValueError, match="temperature of at least 1/700"):
        nt_xent_loss(pictures, texts, 1e-4)
    with pytest.raises(ValueError, match="embeddings of unit length"):
        clip_loss(30 * pictures, 30 * texts, torch.tensor(100.0))


def test_share_found_counts_what_is_true() -> None:
    """Against a count by hand; a query is never its own answer."""
    axes = torch.eye(3)
    identity = torch.tensor([1, 2, 3])
    assert float(share_found(axes, axes, identity, identity, first_are_same=False)) == 1.0
    swapped = torch.tensor([2, 1, 3])
    assert float(share_found(axes, axes, swapped, identity, first_are_same=False)) == pytest.approx(1 / 3)
    any_of_two = torch.tensor([[5, 1], [5, 6], [3, 3]])  # the second finds nothing that it wants
    assert float(share_found(axes, axes, any_of_two, identity, first_are_same=False)) == pytest.approx(2 / 3)
    assert float(share_found(axes, axes, identity, any_of_two, first_are_same=False)) == pytest.approx(2 / 3)
    views = torch.cat([axes, axes])
    assert float(share_found(axes, views, identity, identity.repeat(2), first_are_same=True)) == 1.0


# ---- the objectives ----


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """A tokenizer trained on scenes."""
    return make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def new_start(name: str, tokenizer: PreTrainedTokenizerFast, family: str = "vit") -> Start:
    """What the objective called `name` starts from: two layers, 16 patches, random weights."""
    torch.manual_seed(0)
    if name == "simclr":
        shape: Any = ViTShape(family, WIDTH, 2, 2, PATCH, SIDE) if family != "resnet" else ResNetShape(18, SIDE)  # type: ignore[arg-type]
        return Start(SIDE, new_tower(shape))
    if name == "clip":
        tokenizer = clip_tokenizer(tokenizer, LENGTH)
    shape = ViTShape(name, WIDTH, 2, 2, PATCH, SIDE)  # type: ignore[arg-type]
    model = new_pair(shape, TextShape(WIDTH, 2, 2, LENGTH, 2 * WIDTH), tokenizer)
    return Start(SIDE, None, model, new_image_processor(name, SIDE), tokenizer)  # type: ignore[arg-type]


def tiny_objective(name: str, tokenizer: PreTrainedTokenizerFast, family: str = "vit") -> Any:
    """The objective called `name` on a tiny new model, ready to train."""
    start = new_start(name, tokenizer, family)
    objective: ClipObjective | SiglipObjective | SimclrObjective
    match name:
        case "clip":
            objective = clip.build(clip.Settings(), start)
        case "siglip":
            objective = siglip.build(siglip.Settings(start_temperature=10, start_bias=-10), start)
        case _:
            settings = simclr.Settings(head_hidden=24, projection=12, temperature=0.5)
            objective = simclr.build(settings, start)
    freeze_all_but(objective, objective.trained_parameters())
    return objective.train()


def pictures(count: int) -> list[Picture]:
    """Pictures of noise in different sizes, with one text each."""
    random = np.random.default_rng(0)
    sizes = random.integers(33, 60, (count, 2))
    return [
        Picture(f"noise {i}", torch.from_numpy(random.integers(0, 256, (3, *size), dtype=np.uint8)), (text,))
        for i, (size, text) in enumerate(zip(sizes, TEXTS * count, strict=False))
    ]


def samples_of(objective: Any, count: int) -> list[Any]:
    """Samples of `count` pictures."""
    return [objective.sample(picture, np.random.default_rng(i)) for i, picture in enumerate(pictures(count))]


def gradients(objective: nn.Module) -> dict[str, Tensor]:
    """The gradient of each parameter that has one."""
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


FAMILIES = [
    ("clip", "clip"),
    ("siglip", "siglip"),
    ("simclr", "vit"),
    ("simclr", "clip"),
    ("simclr", "siglip"),
    ("simclr", "dinov2"),
    ("simclr", "resnet"),
]


@pytest.mark.parametrize(("name", "family"), FAMILIES)
def test_what_is_named_trains_and_nothing_else(name: str, family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """The parameters with a gradient are those that the objective names; only a mask token stays behind."""
    objective = tiny_objective(name, tokenizer, family)
    for parameter in objective.parameters():
        parameter.requires_grad_(True)
    total_loss(objective(**objective.collate(samples_of(objective, 4)))).backward()
    assert set(gradients(objective)) == objective.trained_parameters()
    left = {name for name, _ in objective.named_parameters()} - objective.trained_parameters()
    assert left == ({"tower.model.embeddings.mask_token"} if family == "dinov2" else set())


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_are_the_whole_batch(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Cached representations (by hand, and the trainer's) have the value and the gradient of the batch at once."""
    objective = tiny_objective(name, tokenizer)
    samples = samples_of(objective, 6)
    whole = objective(**objective.collate(samples))
    total_loss(whole).backward()
    expected = gradients(objective)
    parts = [objective.collate(samples[start : start + 2]) for start in (0, 2, 4)]
    objective.zero_grad(set_to_none=True)
    by_hand(objective, parts)
    torch.testing.assert_close(gradients(objective), expected, rtol=1e-4, atol=5e-6)
    objective.zero_grad(set_to_none=True)
    values = cached_step(objective, parts)
    torch.testing.assert_close(gradients(objective), expected, rtol=1e-4, atol=5e-6)
    torch.testing.assert_close(total_loss(values), total_loss(whole).detach(), rtol=1e-5, atol=1e-6)


def by_hand(objective: Any, parts: Sequence[Any]) -> None:
    """GradCache (Gao et al. 2021): gradients of representations first, then of parameters, a part at a time."""
    with torch.no_grad():
        found = [objective.represent(**part) for part in parts]
    leaves = {name: torch.cat([one[name] for one in found]) for name in found[0]}
    for value in leaves.values():
        value.requires_grad_(value.is_floating_point())
    total_loss(objective.compare(leaves)).backward()
    for number, part in enumerate(parts):
        for name, value in objective.represent(**part).items():
            if value.requires_grad:
                value.backward(leaves[name].grad.chunk(len(parts))[number], retain_graph=True)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", NAMES)
def test_a_few_steps_learn_the_batch(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """The loss falls, and the right one is found far more often than by chance (1 in 6; 1 in 11 views)."""
    objective = tiny_objective(name, tokenizer)
    batch = objective.collate(samples_of(objective, 6))
    optimiser = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], lr=5e-4)
    losses = []
    for step in range(100):  # 60 suffice for all but SigLIP, whose positions start stronger
        values = objective(**batch)
        optimiser.zero_grad()
        total_loss(values).backward()
        optimiser.step()
        objective.after_step(step, 100)
        losses.append(float(total_loss(values).detach()))
    assert losses[-1] < 0.7 * losses[0]
    found = "view_finds_view" if name == "simclr" else "picture_finds_text"
    assert float(values[found]) > (0.4 if name == "simclr" else 0.9)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_one_is_refused(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """In training; the last batch of a held-out set may be that small."""
    objective = tiny_objective(name, tokenizer)
    batch = objective.collate(samples_of(objective, 1))
    with pytest.raises(ValueError, match="batch_size x accumulation x processes has to be 2 or more"):
        objective(**batch)
    assert total_loss(objective.eval()(**batch)).isfinite()


@pytest.mark.parametrize("name", NAMES)
def test_all_chance_comes_from_the_generator(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Two samples with one seed are equal, and views have the stage's side."""
    objective = tiny_objective(name, tokenizer)
    one, two = (objective.collate(samples_of(objective, 3)) for _ in range(2))
    assert one["views"].shape[-2:] == (SIDE, SIDE) and one["views"].dtype == torch.uint8
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=0)


@pytest.mark.parametrize(("name", "family"), FAMILIES[:4])
def test_layers_above_count_down_to_the_head(name: str, family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Embeddings of two layers have 3 above them, the layers 2 and 1, what follows none; so has the text half."""
    objective = tiny_objective(name, tokenizer, family)
    halves = {"simclr": ["tower.model."]}.get(name, ["model.vision_model.", "model.text_model."])
    for half in halves:
        heights = {n: objective.layers_above(n) for n, _ in objective.named_parameters() if n.startswith(half)}
        assert set(heights.values()) == {0, 1, 2, 3}
        assert {h for n, h in heights.items() if "position_embedding" in n} == {3}
        assert {h for n, h in heights.items() if ".0." in n} == {2} and {
            h for n, h in heights.items() if ".1." in n
        } == {1}
    others = [n for n, _ in objective.named_parameters() if not n.startswith(tuple(halves))]
    assert others and all(objective.layers_above(n) == 0 for n in others)


def test_simclr_exports_its_tower(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    objective = tiny_objective("simclr", tokenizer).eval()
    objective.export(tmp_path)
    views = objective.collate(samples_of(objective, 2))["views"][:, 0]
    theirs = load_tower(tmp_path).eval()
    pixels = theirs.normalise(views)
    torch.testing.assert_close(theirs(pixels).pooled, objective.tower(pixels).pooled)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_the_export_answers_as_it_was_trained(name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """transformers alone loads it, and gives the embeddings that training compared."""
    objective = tiny_objective(name, tokenizer).eval()
    samples = samples_of(objective, 4)
    objective.export(tmp_path)
    model, processor = AutoModel.from_pretrained(tmp_path).eval(), AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(model, CLIPModel if name == "clip" else SiglipModel)
    inputs = processor(
        text=[sample.text for sample in samples],
        images=[sample.view for sample in samples],
        padding="max_length",
        return_tensors="pt",
    )
    assert inputs["input_ids"].shape[-1] == LENGTH
    with torch.no_grad():
        theirs = model(**inputs)
        ours = objective.represent(**objective.collate(samples))
    torch.testing.assert_close(ours["pictures"], theirs.image_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours["texts"], theirs.text_embeds, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_loaded_checkpoint_goes_on(name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Temperature and bias stay as they are unless the recipe says otherwise."""
    first = tiny_objective(name, tokenizer)
    with torch.no_grad():
        first.model.logit_scale.fill_(3.0)
    first.export(tmp_path)
    embedder = load_embedder(tmp_path)
    start = Start(SIDE, embedder.tower, embedder.model, embedder.tower.image_processor, embedder.tokenizer)
    module: Any = {"clip": clip, "siglip": siglip}[name]
    objective = module.build(module.Settings(), start)
    assert objective.model.logit_scale.item() == 3.0
    objective = module.build(module.Settings(start_temperature=20), start)
    assert objective.model.logit_scale.exp().item() == pytest.approx(20)
    assert name == "clip" or objective.model.logit_bias.item() == -10
    batch = objective.collate(samples_of(objective, 3))
    total_loss(objective.train()(**batch)).backward()
    small = objective.tower.normalise(batch["views"][..., :24, :24])  # position embeddings are interpolated
    assert objective.model.get_image_features(small, interpolate_pos_encoding=True).pooler_output.isfinite().all()


def test_published_clips_say_that_their_end_is_2(tokenizer: PreTrainedTokenizerFast) -> None:
    """OpenAI's configs do; transformers then pools at the largest id, which is the end of the text there."""
    start = new_start("clip", tokenizer)
    assert isinstance(start.model, CLIPModel)
    objective = clip.build(clip.Settings(), start)
    ids = text_ids(objective.model, objective.tokenizer, TEXTS)
    before = objective.model.get_text_features(ids).pooler_output
    start.model.text_model.eos_token_id = start.model.config.text_config.eos_token_id = 2
    after = clip.build(clip.Settings(), start).model.get_text_features(ids).pooler_output
    torch.testing.assert_close(before, after, rtol=0, atol=0)
    with pytest.raises(ValueError, match="this tokenizer ends a text with number"):
        clip.build(clip.Settings(), Start(SIDE, None, start.model, start.image_processor, tokenizer))


def test_texts_are_read_as_the_models_read_them(tokenizer: PreTrainedTokenizerFast) -> None:
    """A long text keeps its end token; CLIP's padding changes nothing; SigLIP's is always there."""
    objective = tiny_objective("clip", tokenizer)
    long = "a very long text about a red circle " * 9
    ids = text_ids(objective.model, objective.tokenizer, ["a dog", long])
    end = objective.tokenizer.eos_token_id
    assert ids.shape == (2, LENGTH) and int(ids[1, -1]) == end and int((ids == end).sum()) == 2
    short = text_ids(objective.model, objective.tokenizer, ["a dog"])
    assert short.shape == (1, 16)
    embedded = [objective.model.get_text_features(one).pooler_output for one in (short, ids[:1])]
    torch.testing.assert_close(*embedded, rtol=1e-5, atol=1e-6)
    reader = tiny_objective("siglip", tokenizer)
    assert text_ids(reader.model, reader.tokenizer, ["a dog"]).shape == (1, LENGTH)


def test_clips_scale_stays_below_100(tokenizer: PreTrainedTokenizerFast) -> None:
    """And a new one starts at 1 / 0.07."""
    objective = tiny_objective("clip", tokenizer)
    assert objective.model.logit_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-3)
    with torch.no_grad():
        objective.model.logit_scale.fill_(9.0)
    objective.after_step(0, 10)
    assert objective.model.logit_scale.exp().item() == pytest.approx(100)


def test_a_new_siglip_needs_a_temperature(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="start_temperature: 10 and start_bias: -10"):
        siglip.build(siglip.Settings(), new_start("siglip", tokenizer))


def test_what_does_not_fit_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tower, pair = new_start("simclr", tokenizer), new_start("siglip", tokenizer)
    with pytest.raises(ValueError, match="a tower alone was given"):
        clip.build(clip.Settings(), tower)
    with pytest.raises(ValueError, match="a SiglipModel was given"):
        clip.build(clip.Settings(), pair)
    with pytest.raises(ValueError, match="trains a tower alone"):
        simclr.build(simclr.Settings(), pair)
    with pytest.raises(ValueError, match="does not divide into patches"):
        simclr.build(simclr.Settings(), Start(SIDE + 1, tower.tower))
    with pytest.raises(ValueError, match="does not divide into patches"):
        settings = siglip.Settings(start_temperature=10, start_bias=-10)
        siglip.build(settings, Start(SIDE + 1, None, pair.model, pair.image_processor, pair.tokenizer))


def test_texts_of_a_picture(tokenizer: PreTrainedTokenizerFast) -> None:
    """Any of them may come; one with a side in it keeps the picture as it is; none is an error with a name."""
    objective = tiny_objective("siglip", tokenizer)
    assert not isinstance(objective, SimclrObjective)
    pixels = torch.arange(SIDE, dtype=torch.uint8).expand(3, SIDE, SIDE)
    whole = type(objective)(objective.model, tokenizer, objective.tower.image_processor, SIDE, smallest_crop=1.0)
    seen = [whole.sample(Picture("x", pixels, ("to the left", "a dog")), np.random.default_rng(i)) for i in range(30)]
    assert {sample.text for sample in seen} == {"to the left", "a dog"}
    falls = [bool((sample.view[0, 0].int().diff() < 0).any()) for sample in seen]
    assert not any(mirrored for mirrored, sample in zip(falls, seen, strict=True) if sample.text == "to the left")
    assert any(falls)
    with pytest.raises(DataError, match=r"row 7 of mine\.jsonl has no text"):
        objective.sample(Picture("row 7 of mine.jsonl", pixels), np.random.default_rng(0))


def test_identity_is_the_texts_alone() -> None:
    """Equal texts only have equal ones, and any int64 tensor holds them."""
    found = torch.tensor([identity_of(text) for text in TEXTS])
    assert (found[:, None] == found).tolist() == [[a == b for b in TEXTS] for a in TEXTS]


# ---- two processes ----


def joined() -> dict[str, Tensor]:
    """What both ranks hold together: four samples a rank, texts that repeat within and across them."""
    return {"first": units(8, seed=1), "second": units(8, seed=2), "identity": torch.tensor([1, 2, 1, 3, 2, 4, 5, 5])}


def losses_of(inputs: Sequence[Tensor], identity: Tensor) -> dict[str, Tensor]:
    """Each loss of two embeddings, scale and bias, with and without texts that repeat."""
    first, second, scale, bias = inputs
    return {
        "nt_xent": nt_xent_loss(first, second, 0.2),
        "clip": clip_loss(first, second, scale),
        "clip_repeated": clip_loss(first, second, scale, identity),
        "sigmoid": sigmoid_loss(first, second, scale, bias),
        "sigmoid_repeated": sigmoid_loss(first, second, scale, bias, identity),
        "sigmoid_several": sigmoid_loss(first, second, scale, bias, identity, torch.stack([identity, identity % 3], 1)),
    }


def losses_and_gradients(part: slice) -> dict[str, list[Tensor]]:
    """Value, and gradient of embeddings, scale and bias, of each loss of `part` of the joined batch."""
    batch = {name: value[part] for name, value in joined().items()}
    leaves = [batch["first"], batch["second"], torch.tensor(10.0), torch.tensor([-4.0])]
    found = {}
    for name in losses_of(leaves, batch["identity"]):
        fresh = [leaf.clone().requires_grad_() for leaf in leaves]
        loss = losses_of(fresh, batch["identity"])[name]
        grads = torch.autograd.grad(loss, fresh, allow_unused=True)
        found[name] = [loss.detach(), *(torch.zeros(1) if g is None else g for g in grads)]
    return found


def gathered() -> dict[str, Tensor]:
    """What each function of `training.gather` makes of a rank's own numbers."""
    own = torch.arange(6.0).view(3, 2) + 10 * rank()
    leaf = own.clone().requires_grad_()
    everyone = gather_with_gradient(leaf)
    (everyone * torch.arange(1.0, len(everyone) + 1)[:, None] * (rank() + 1)).sum().backward()
    assert leaf.grad is not None
    return {
        "everyone": everyone.detach(),
        "gradient": leaf.grad,
        "same": gather(own),
        "others": others_of(gather(own)),
        "mean": mean_over_ranks(own),
        "sum": sum_over_ranks(own),
        "neighbour": exchange_with_neighbour(own),
    }


def on_one_rank(number: int, folder: str) -> None:
    """One of two processes: losses, gatherings, and each objective under DistributedDataParallel."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=RANKS)
    found: dict[str, Any] = {"losses": losses_and_gradients(slice(4 * number, 4 * number + 4)), "gathered": gathered()}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    for name in NAMES:
        objective = tiny_objective(name, tokenizer)
        samples = samples_of(objective, 6)[3 * number : 3 * number + 3]
        wrapped = DistributedDataParallel(objective)
        loss = total_loss(wrapped(**objective.collate(samples)))
        loss.backward()
        found[name] = {"loss": mean_over_ranks(loss), "gradients": gradients(objective)}
    torch.save(found, f"{folder}/{number}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Any]]:
    """What two gloo processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    tokenizer.save_pretrained(folder)
    on_two_ranks(on_one_rank, str(folder))
    return [torch.load(folder / f"{number}.pt") for number in range(RANKS)]


def test_losses_of_two_ranks_are_those_of_one(two_ranks: list[dict[str, Any]]) -> None:
    """Values and gradients of parameters are the mean over ranks, as DDP makes it; embeddings lie on their ranks."""
    for name, (value, *expected) in losses_and_gradients(slice(None)).items():
        (one, *first), (two, *second) = (found["losses"][name] for found in two_ranks)
        torch.testing.assert_close((one + two) / 2, value, rtol=1e-5, atol=1e-6, msg=name)
        for number in (0, 1):
            everyone = torch.cat([first[number], second[number]]) / 2
            torch.testing.assert_close(everyone, expected[number], rtol=1e-5, atol=1e-6, msg=name)
        for number in (2, 3):
            mean = (first[number] + second[number]) / 2
            torch.testing.assert_close(mean, expected[number], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_objectives_on_two_ranks_are_one_process(
    name: str, two_ranks: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Under DistributedDataParallel, value and gradient of every parameter; SimCLR's batch norm sees both ranks."""
    objective = tiny_objective(name, tokenizer)
    loss = total_loss(objective(**objective.collate(samples_of(objective, 6))))
    loss.backward()
    expected = gradients(objective)
    for found in two_ranks:
        torch.testing.assert_close(found[name]["loss"], loss.detach(), rtol=1e-5, atol=1e-6)
        assert set(found[name]["gradients"]) == set(expected)
        for parameter, gradient in expected.items():
            # The tower rounds another number of pictures differently; the losses alone are compared to 1e-5 above.
            tolerance = 3e-5 * max(1.0, float(gradient.abs().max()))
            torch.testing.assert_close(found[name]["gradients"][parameter], gradient, rtol=0, atol=tolerance)


def test_gathering_keeps_the_order_of_the_ranks(two_ranks: list[dict[str, Any]]) -> None:
    """Rank 1 holds rank 0's numbers plus 10; the gradient of a part is the sum of what both ranks say of it."""
    own = torch.arange(6.0).view(3, 2)
    everyone = torch.cat([own, own + 10])
    for number, found in enumerate(one["gathered"] for one in two_ranks):
        torch.testing.assert_close(found["everyone"], everyone)
        torch.testing.assert_close(found["same"], everyone)
        weights = torch.arange(1.0, 7)[3 * number : 3 * number + 3, None].expand(3, 2)
        torch.testing.assert_close(found["gradient"], 3 * weights)
        torch.testing.assert_close(found["others"], own + 10 * (1 - number))
        torch.testing.assert_close(found["neighbour"], own + 10 * (1 - number))
        torch.testing.assert_close(found["sum"], 2 * own + 10)
        torch.testing.assert_close(found["mean"], own + 5)


def test_one_process_is_its_own_company() -> None:
    """Without torch.distributed each function returns what it was given."""
    assert (ranks(), rank()) == (1, 0)
    found = gathered()
    own = torch.arange(6.0).view(3, 2)
    for name in ("everyone", "same", "mean", "sum", "neighbour"):
        torch.testing.assert_close(found[name], own)
    assert found["others"].shape == (0, 2)


def test_several_texts_may_be_true_of_a_picture() -> None:
    """The sigmoid loss with sets of true texts is the formula in plain loops, in value and gradient."""
    torch.manual_seed(3)
    pictures, texts = (functional.normalize(torch.randn(5, 8), dim=-1).requires_grad_() for _ in range(2))
    identity = torch.tensor([10, 11, 12, 10, 14])
    true = torch.tensor([[10, 10, 10], [11, 12, 11], [12, 12, 14], [10, 11, 12], [14, 14, 14]])
    ours = sigmoid_loss(pictures, texts, torch.tensor(5.0), torch.tensor(-2.0), identity, true)
    expected = torch.zeros(())
    for i in range(5):
        for j in range(5):
            sign = 1 if int(identity[j]) in true[i].tolist() else -1
            expected = expected - functional.logsigmoid(sign * (5.0 * pictures[i] @ texts[j] - 2.0)) / 5
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (pictures, texts)), torch.autograd.grad(expected, (pictures, texts)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
