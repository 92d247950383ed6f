"""What makes instruction tuning fast changes no loss and no gradient: packing, kept features, the step's own mean."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from assistant.chat import encode_conversation
from assistant.checkpoint import load_llava
from serving.engine import free_port
from tests.ranks import as_launched, on_two_ranks
from tests.small_runs import assert_same_gradients
from tests.test_training import lessons, view
from tests.tiny import make_tiny_llava
from training.config import Schedule
from training.feature_cache import FeatureCache, content_key
from training.objectives.instruct import InstructObjective, Lesson, Part, tokens_per_picture
from training.step_weight import share_step_weight
from training.trainer import ObjectiveTrainer, freeze_all_but

ALL: tuple[Part, ...] = ("tower", "projector", "language")
WORDS = "a large red circle and a small blue square on a white ground"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny(folder: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    return load_llava(folder)


def objective_on(folder: Path, trains: Sequence[Part] = ALL, **said: Any) -> InstructObjective:
    """A new objective whose declared parameters train, and no other."""
    objective = InstructObjective(*load_llava(folder), trains, longest=900, **said)
    freeze_all_but(objective, objective.trained_parameters())
    return objective.train()


def gradients(objective: InstructObjective, batch: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    """Loss of the batch and the gradient of every parameter that trains."""
    objective.zero_grad(set_to_none=True)
    loss = objective(**batch)["answer_loss"]
    loss.backward()
    found = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    assert found.keys() == objective.trained_parameters()
    return float(loss), found


def test_packed_rows_equal_padded_rows(folder: Path) -> None:
    """Several turns about a picture, none, two pictures, a dialogue: the loss of each, and every gradient of all."""
    padded, packed = objective_on(folder), objective_on(folder, packing=True)
    rows, row = dict(padded.collate(lessons())), dict(packed.collate(lessons()))
    assert rows["ids"].shape[0] == 4 and row["ids"].shape[0] == 1
    assert row["ids"].numel() < rows["ids"].numel()
    lengths = [int(objective_targets(padded, lesson)) for lesson in lessons()]
    for number in range(4):
        only = torch.cat([torch.full((size,), float(place == number)) for place, size in enumerate(lengths)])
        alone = float(padded(**padded.collate([lessons()[number]]))["answer_loss"].detach())
        for objective, batch in ((padded, rows), (packed, row)):
            loss = float(objective(**{**batch, "weights": batch["weights"] * only})["answer_loss"].detach())
            assert loss == pytest.approx(alone, rel=1e-5), number
    loss, ours = gradients(packed, row)
    theirs_loss, theirs = gradients(padded, rows)
    assert loss == pytest.approx(theirs_loss, rel=1e-5)
    assert_same_gradients(ours, theirs)


def objective_targets(objective: InstructObjective, lesson: Lesson) -> int:
    """How many tokens of a lesson are learned."""
    return int(objective.pack(lesson).supervised.sum())


@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_is_that_of_transformers_on_the_same_batch(folder: Path, packing: bool) -> None:
    """Single conversations of different lengths, right-padded, with `labels`: transformers' own shift and mean."""
    objective = objective_on(folder, packing=packing)
    plain = [Lesson("short", (view(0),), (("What?", "red"),)), Lesson("long", (view(1),), (("Say more.", WORDS),))]
    witness, processor = load_llava(folder)
    encoded = [
        encode_conversation(processor.tokenizer, lesson.conversations()[0], tokens_per_picture(processor))
        for lesson in plain
    ]
    length = max(len(each.ids) for each in encoded)
    ids = torch.full((2, length), processor.tokenizer.pad_token_id)
    labels, attention = torch.full((2, length), -100), torch.zeros(2, length, dtype=torch.long)
    for row, each in enumerate(encoded):
        size = len(each.ids)
        ids[row, :size], attention[row, :size] = torch.tensor(each.ids), 1
        labels[row, :size] = torch.where(torch.tensor(each.supervised), torch.tensor(each.ids), -100)
    pixels = processor.image_processor([lesson.views[0] for lesson in plain], return_tensors="pt")["pixel_values"]
    theirs = witness(input_ids=ids, attention_mask=attention, pixel_values=pixels, labels=labels).loss
    assert float(objective(**objective.collate(plain))["answer_loss"]) == pytest.approx(float(theirs), rel=1e-5)


def test_kept_features_are_those_of_the_tower(folder: Path) -> None:
    """Loss and gradients equal to the last bit, each picture computed once, also where it stands twice in a batch."""
    cache = FeatureCache(2**30)
    kept, fresh = objective_on(folder, ("projector",), features=cache), objective_on(folder, ("projector",))
    twice = [*lessons(), Lesson("again", (view(0),), (("What now?", "blue"),))]
    expected = gradients(fresh, dict(fresh.collate(twice)))
    for _ in range(2):
        found = gradients(kept, dict(kept.collate(twice)))
        assert found[0] == expected[0]
        assert all(torch.equal(found[1][name], gradient) for name, gradient in expected[1].items())
        assert cache.computed == 4  # views 0 to 3
    changed = view(0).clone()
    changed[0, 0, 0] += 1
    assert not torch.equal(content_key(changed), content_key(view(0)))


def test_a_full_cache_computes_and_does_not_grow(folder: Path) -> None:
    one = 100 * 64 * 4  # bytes of one picture's features
    cache = FeatureCache(one)
    objective = objective_on(folder, ("projector",), features=cache)
    losses = [float(objective(**objective.collate(lessons()))["answer_loss"]) for _ in range(2)]
    assert losses[0] == losses[1] and cache.held_bytes == one
    assert cache.computed == 4 + 3


def uneven_lessons() -> list[Lesson]:
    """Eight lessons, of one to twelve words; some without a picture and some with two."""
    made = []
    for number in range(8):
        words = " ".join(WORDS.split()[: 1 + number * 3 % 13])
        made.append(Lesson(f"lesson {number}", tuple(view(v) for v in range(number % 3)), (("What is it?", words),)))
    return made


def first_gradient(
    folder: Path, runs: Path, batch_size: int, accumulation: int, places: list[Lesson]
) -> dict[str, Tensor]:
    """The gradient that the optimiser gets in the first step, before it is clipped, through the one trainer."""
    objective = objective_on(folder)
    schedule = Schedule(
        steps=1, batch_size=batch_size, accumulation=accumulation, learning_rate=1e-3, bf16=False, save_every=10**6
    )
    trainer = ObjectiveTrainer(objective, schedule, runs, places, places[:1])  # type: ignore[arg-type]
    found: dict[str, Tensor] = {}

    def keep(model: Any) -> Tensor:
        found.update({name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None})
        return torch.zeros(())

    trainer._clip_grad_norm = keep  # type: ignore[method-assign]
    runs.mkdir(parents=True, exist_ok=True)
    trainer.train()
    return found


def test_accumulation_weighs_every_token_alike(folder: Path, tmp_path: Path) -> None:
    """Two micro-batches of four give the gradient of eight, and four of two as well."""
    whole = first_gradient(folder, tmp_path / "8", 8, 1, uneven_lessons())
    assert_same_gradients(first_gradient(folder, tmp_path / "2x4", 4, 2, uneven_lessons()), whole)
    assert_same_gradients(first_gradient(folder, tmp_path / "4x2", 2, 4, uneven_lessons()), whole)


def test_a_mean_of_means_would_be_another_gradient(folder: Path) -> None:
    """Or the test above would prove nothing: without the step's weight short micro-batches count for more."""
    objective = objective_on(folder)
    batches = [dict(objective.collate(uneven_lessons()[start : start + 4])) for start in (0, 4)]
    apart = sum(float(objective(**batch)["answer_loss"]) for batch in batches) / 2
    share_step_weight(batches, torch.device("cpu"))
    together = sum(float(objective(**batch)["answer_loss"]) for batch in batches) / 2
    whole = float(objective(**objective.collate(uneven_lessons()))["answer_loss"].detach())
    assert together == pytest.approx(whole, rel=1e-5)
    assert abs(apart - whole) > 1e-3


def train_as(rank: int, folder: Path, runs: Path, port: int, batch_size: int, accumulation: int) -> None:
    """One of two processes: the first rank sees texts alone in its first batch, the second many pictures."""
    as_launched(rank, port)
    found = first_gradient(folder, runs / f"rank-{rank}", batch_size, accumulation, mixed_lessons())
    if rank == 0:
        torch.save(found, runs / "gradients.pt")


def mixed_lessons() -> list[Lesson]:
    """Four lessons without a picture, then four with two or three each, and answers of different lengths."""
    texts = [Lesson(f"text {n}", (), (("hello", " ".join(WORDS.split()[: n + 1])),)) for n in range(4)]
    pictures = [
        Lesson(
            f"seen {n}", tuple(view(v) for v in range(2 + n % 2)), (("What?", " ".join(WORDS.split()[: 3 * n + 1])),)
        )
        for n in range(4)
    ]
    return [*texts, *pictures]


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (2, 2)])
def test_two_ranks_equal_one_process_with_texts_on_one_and_pictures_on_the_other(
    folder: Path, tmp_path: Path, batch_size: int, accumulation: int
) -> None:
    """Nobody waits for ever, and the gradient is that of all eight lessons in one batch."""
    on_two_ranks(train_as, folder, tmp_path, free_port(), batch_size, accumulation)
    whole = first_gradient(folder, tmp_path / "whole", 8, 1, mixed_lessons())
    assert_same_gradients(torch.load(tmp_path / "gradients.pt"), whole)
