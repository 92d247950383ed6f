"""What plan says of memory is what small real steps take: weights to the byte, layers and losses within percents."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from scripts.benchmarks.measuring import peak_memory
from scripts.measure_costs import (
    CASES,
    HOWS,
    Kept,
    measured,
    measured_of,
    prepared,
    prepared_instruct,
    prepared_language,
    stage_of,
)
from training.config import InstructStage, RecipeError, read_recipe
from training.contrastive_losses import CPU_BLOCK, clip_loss, nt_xent_loss
from training.distillation_losses import crops_loss
from training.objective import Objective, total_loss
from training.objectives.language import LanguageObjective
from training.objectives.moco import keys_loss
from training.planning.activations import kept_by, recomputed
from training.planning.costs import SPARE, WAYS, Costs, Step, weights_of
from training.planning.costs_report import Wanted, planned, recipe_and_stage
from training.planning.losses import Batch, loss_costs
from training.planning.passes import passes_of
from training.planning.subjects import Subjects
from training.sigmoid_loss import sigmoid_loss
from training.stages import Workshop
from training.supervised_loss import CHUNK, supervised_cross_entropy

NOWHERE = Workshop(Path("nowhere"), None)
RESNET = {"backbone": {"family": "resnet", "depth": 18, "image_side": 64}}


@cache
def on_meta(name: str) -> Objective:
    """The small objective called `name`, with shapes alone."""
    return Subjects(NOWHERE).objective(stage_of(name))


@pytest.mark.parametrize("name", CASES)
def test_weights_gradients_and_optimiser_are_exact(name: str) -> None:
    """What AdamW and autograd really hold after a step, of the objective that training builds, with the same names."""
    subject = prepared(stage_of(name), 4)
    real, planned_ = subject.objective, on_meta(name)
    assert {key: weight.shape for key, weight in real.named_parameters()} == {
        key: weight.shape for key, weight in planned_.named_parameters()
    }
    assert real.trained_parameters() == planned_.trained_parameters()
    trained = [weight for weight in real.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4)
    total_loss(real(**subject.batch)).backward()
    for weight in trained:
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad  # gets one in a later step
    optimiser.step()
    held = weights_of(planned_)
    assert held.trained + held.frozen + held.teachers == sum(size_of(weight) for weight in real.parameters())
    assert held.buffers == sum(size_of(buffer) for buffer in real.buffers())
    assert held.gradients == sum(size_of(weight.grad) for weight in trained if weight.grad is not None)
    assert held.optimiser == sum(size_of(value) for state in optimiser.state.values() for value in state.values())


def size_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("recipe", ["scenes", "joey"])
def test_a_stage_is_planned_before_what_it_goes_on_from_was_trained(recipe: str) -> None:
    """Each stage of a chain has shapes, from the settings of the stages before it; a tokenizer from its own."""
    read = read_recipe(recipe)
    subjects = Subjects(NOWHERE, read.stages)
    vocabulary = read.stages[0].model_dump()["vocabulary"]
    for stage in read.stages[1:]:
        objective = subjects.objective(stage)
        held = weights_of(objective)
        assert held.trained > 0 and held.trained == sum(
            size_of(weight) for name, weight in objective.named_parameters() if name in objective.trained_parameters()
        )
        assert vocabulary in {weight.shape[0] for weight in objective.parameters() if weight.ndim == 2}


def test_an_adapter_alone_is_counted_where_it_alone_trains() -> None:
    """Of a LLaVA that is not there yet, only the matrices of rank 4 train; the rest is held, without a gradient."""
    recipe = read_recipe("scenes")
    said = recipe.stages[-1].model_dump(mode="json", exclude_unset=True)
    adapted = InstructStage.model_validate(said | {"trains": ["language"], "rates": {}, "lora": {"rank": 4}})
    objective = Subjects(NOWHERE, recipe.stages).objective(adapted)
    held = weights_of(objective)
    layers, width, inner = 4, 128, 384
    assert held.trained == 4 * layers * 4 * (4 * 2 * width + 3 * (width + inner))
    assert held.gradients == held.trained and held.frozen > 10 * held.trained
    with pytest.raises(RecipeError, match="is not there yet; train align first"):
        Subjects(NOWHERE, recipe.stages).objective(adapted.model_copy(update={"four_bits": True}))


def test_a_stage_that_goes_on_from_models_of_the_hub_wants_the_one_before() -> None:
    recipe = read_recipe("llava-1.5-7b")
    with pytest.raises(RecipeError, match=r"stage tune goes on from align, .* train align first"):
        Subjects(NOWHERE, recipe.stages).objective(recipe.stages[-1])


TOLERANCE = {"fp32": 0.06, "bf16": 0.1, "eager": 0.06, "checkpointed": 0.2}


@pytest.mark.parametrize(
    "how", ["fp32", "checkpointed", *(pytest.param(how, marks=pytest.mark.slow) for how in ("bf16", "eager"))]
)
@pytest.mark.parametrize("name", CASES)
def test_what_is_kept_for_the_way_back_is_what_autograd_keeps(name: str, how: str) -> None:
    changes, half = HOWS[how]
    kept = measured(stage_of(name, **changes), half=half)
    assert kept.ratio() == pytest.approx(1, abs=TOLERANCE[how])


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("prepare", [prepared_language, prepared_instruct], ids=["language", "instruct"])
def test_words_are_kept_as_autograd_keeps_them(prepare: Any, half: bool) -> None:
    kept: Kept = measured_of(prepare(4), 4, half)
    assert kept.ratio() == pytest.approx(1, abs=0.15)


def test_convolutions_are_kept_as_autograd_keeps_them() -> None:
    kept = measured(stage_of("simclr", **RESNET))
    assert kept.ratio() == pytest.approx(1, abs=0.1)


def test_a_layer_that_is_computed_again_is_one_layer() -> None:
    """The difference that one layer more makes, where layers are kept whole."""
    two, three = (
        passes_of(Subjects(NOWHERE).objective(stage_of("simclr", backbone=CASES["simclr"][1] | {"layers": layers})))
        for layers in (2, 3)
    )
    difference = kept_by(three, 5, half=False) - kept_by(two, 5, half=False)
    assert recomputed(three, 5, half=False) == pytest.approx(difference)


def grown(work: Any) -> int:
    """Bytes at the peak of a loss and its way back."""
    return peak_memory(work, torch.device("cpu"))


def unit(*shape: int) -> Tensor:
    """Random directions that train."""
    return functional.normalize(torch.randn(*shape), dim=-1).requires_grad_()


N, WIDTH = 768, 96


def test_the_matrices_of_clip_are_those_of_its_loss() -> None:
    pictures, texts = unit(N, WIDTH), unit(N, WIDTH)
    for scale in (14.3, 100.0):  # in fp32, and past exp's range there in fp64
        costs = loss_costs(on_meta("clip"), Batch(N, block=CPU_BLOCK), scale)
        peak = grown(lambda scale=scale: clip_loss(pictures, texts, torch.tensor(scale)).backward() or torch.zeros(()))
        assert costs.kept + costs.working == pytest.approx(peak, rel=0.35)


def test_the_block_of_siglip_is_that_of_its_loss() -> None:
    pictures, texts = unit(N, WIDTH), unit(N, WIDTH)
    costs = loss_costs(on_meta("siglip"), Batch(N, block=CPU_BLOCK))

    def work() -> Tensor:
        sigmoid_loss(pictures, texts, torch.tensor(10.0), torch.tensor(-10.0)).backward()
        return torch.zeros(())

    assert costs.kept + costs.working == pytest.approx(grown(work), rel=0.35)


def test_the_pairs_of_simclr_are_those_of_its_loss() -> None:
    first, second = unit(N, 32), unit(N, 32)
    costs = loss_costs(on_meta("simclr"), Batch(N, block=CPU_BLOCK))
    head = 2 * N * 4 * (96 + 128 + 128 + 32)

    def work() -> Tensor:
        nt_xent_loss(first, second, 0.1).backward()
        return torch.zeros(())

    assert costs.kept - head + costs.working == pytest.approx(grown(work), rel=0.35)


def test_the_scores_of_moco_are_those_of_its_loss() -> None:
    queries, keys = [unit(N, 32) for _ in range(2)], [unit(N, 32).detach() for _ in range(2)]
    costs = loss_costs(on_meta("moco"), Batch(N))
    scores = 4 * 4 * N * N

    def work() -> Tensor:
        (keys_loss(queries[0], keys[1], 0.2) + keys_loss(queries[1], keys[0], 0.2)).backward()
        return torch.zeros(())

    assert scores == pytest.approx(grown(work), rel=0.35)
    assert costs.kept + costs.working > scores


def test_the_scores_of_dino_are_those_of_its_loss() -> None:
    """Student scores, their gradient, and the teacher's mean; what stands before the loss is there already."""
    student = torch.randn(64, 4, 512).requires_grad_()
    teacher = torch.randn(64, 2, 512).softmax(-1)
    costs = loss_costs(on_meta("dino"), Batch(64))

    def work() -> Tensor:
        crops_loss(student, teacher, 0.1).backward()
        return torch.zeros(())

    assert costs.working + 64 * 512 * 4 == pytest.approx(grown(work), rel=0.5)


def test_the_logits_of_a_language_model_are_those_of_a_chunk() -> None:
    subject = prepared_language(4)
    assert isinstance(subject.objective, LanguageObjective)
    head = subject.objective.model.get_output_embeddings().weight.detach().requires_grad_()
    hidden = torch.randn(4 * 64, 96).requires_grad_()
    targets = torch.randint(len(head), (4 * 64,))

    def work() -> Tensor:
        supervised_cross_entropy(hidden, head, targets, torch.ones(4 * 64), CHUNK).backward()
        return torch.zeros(())

    costs = loss_costs(subject.objective, Batch(4, tokens=64))
    assert costs.kept + costs.working == pytest.approx(grown(work), rel=0.35)


def test_what_fits_is_the_most_that_fits() -> None:
    """One sample more would pass the memory that is given, less what is spared."""
    recipe, stage = recipe_and_stage("dinov2")
    costs = Costs(stage, Subjects(NOWHERE, recipe.stages).objective(stage))
    for way in WAYS:
        step = Step(stage, 8, 1, 1, True, way)
        most = costs.largest_batch(step, 10e9)
        sizes = [sum(costs.memory(replace(step, samples=count)).values()) for count in (most, most + 1)]
        assert sizes[0] <= 10e9 * (1 - SPARE) < sizes[1]
    assert costs.largest_batch(Step(stage, 8, 1, 1, True, WAYS[0]), 1e8) == 0


def test_the_thriftiest_way_is_taken_only_where_it_must() -> None:
    """DDP where it fits; then checkpointing, FSDP, both; then the same batch in parts."""
    chosen = [
        planned(Wanted("dinov2", 512, memory), Path("nowhere"))[2] for memory in ("80GB", "6GB", "2.5GB", "1.4GB")
    ]
    assert [str(step.way) for step in chosen] == [
        "DDP",
        "DDP, checkpointed",
        "FSDP, checkpointed",
        "FSDP, checkpointed",
    ]
    assert [step.accumulation for step in chosen] == [1, 1, 1, 2]
    assert {step.all_samples for step in chosen} == {512 * 64}


def test_sharding_divides_what_is_kept_of_weights() -> None:
    recipe, stage = recipe_and_stage("siglip")
    costs = Costs(stage, Subjects(NOWHERE, recipe.stages).objective(stage))
    whole, shared = (costs.memory(Step(stage, 64, 8, 1, False, way)) for way in (WAYS[0], WAYS[2]))
    for part in ("gradients", "AdamW"):
        assert shared[part] == whole[part] / 64
    assert shared["activations"] == whole["activations"]
    assert whole["DDP's buckets"] == whole["gradients"] and "DDP's buckets" not in shared
