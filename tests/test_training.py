"""The parts of training against outside witnesses: sentencepiece, transformers, torch and plain loops."""

import math
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from pydantic import ValidationError
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from assistant.chat import ConversationError, assistant_message, encode_conversation, user_message
from assistant.checkpoint import load_llava
from assistant.models import ModelError
from assistant.pixels import pixels_of
from assistant.towers import normalised
from tests.tiny import make_tiny_llava, make_tiny_tokenizer
from training.config import PictureSource
from training.data.mixing import mixture_plan
from training.data.pictures import DataError, DecodedPictures, PictureRow
from training.data.samples import SceneLessons, sentence
from training.data.scenes import make_scene
from training.data.sources import open_pictures
from training.data.views import mirrors_safely, random_view, square
from training.objectives.instruct import PREFIXES, InstructObjective, Lesson
from training.sigmoid_loss import sigmoid_loss
from training.supervised_loss import supervised_cross_entropy
from training.trainer import freeze_all_but

STRANGE_TEXTS = ["A red circle.", " two  spaces ", "日本 ☃ é", "line\n\nline\t", "123 4567", "", "<s> typed </s>"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """A tokenizer trained on scenes; its sentencepiece model lies beside it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = make_tiny_tokenizer(folder)
    tokenizer.save_pretrained(folder)
    tokenizer.folder = folder
    return tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A tiny random LLaVA, saved and loaded."""
    return load_llava(make_tiny_llava(tmp_path_factory.mktemp("tiny")))


def view(seed: int) -> torch.Tensor:
    """A picture of noise, uint8 (3, 160, 160)."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, 160, 160), dtype=np.uint8))


def test_the_fast_tokenizer_is_sentencepiece(tokenizer: PreTrainedTokenizerFast) -> None:
    """Same ids as sentencepiece itself, and decoding gives the text back."""
    witness = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.folder / "tokenizer.model"))
    for text in STRANGE_TEXTS[:-1]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == witness.encode(text), text
        assert tokenizer.decode(ids) == text


def test_only_answers_and_their_ends_are_supervised(tokenizer: PreTrainedTokenizerFast) -> None:
    """The mask is the template's own spans, over several turns and pictures."""
    messages = [
        user_message("What?", 2),
        assistant_message("a red circle"),
        user_message("More?"),
        assistant_message("3"),
    ]
    encoded = encode_conversation(tokenizer, messages, tokens_per_picture=5)
    supervised = [i for i, s in zip(encoded.ids, encoded.supervised, strict=True) if s]
    assert tokenizer.decode(supervised) == "a red circle</s>3</s>"
    assert encoded.ids.count(tokenizer.convert_tokens_to_ids("<image>")) == 10
    asked = str(tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False))
    prompt = tokenizer(asked.replace("<image>", 5 * "<image>"), add_special_tokens=False)["input_ids"]
    assert encoded.ids[: len(prompt)] == prompt


def test_a_conversation_that_teaches_nothing_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    """It has no answer."""
    with pytest.raises(ConversationError, match="nothing is supervised"):
        encode_conversation(tokenizer, [user_message("Hello")], 5)


@pytest.mark.parametrize("chunk", [1, 7, None])
def test_supervised_loss_is_cross_entropy(chunk: int | None) -> None:
    """Value and both gradients equal torch's own on full logits."""
    torch.manual_seed(0)
    hidden = torch.randn(23, 16, requires_grad=True)
    head = torch.randn(50, 16, requires_grad=True)
    targets, weights = torch.randint(0, 50, (23,)), torch.rand(23) + 0.1
    ours = supervised_cross_entropy(hidden, head, targets, weights, chunk)
    gradients = torch.autograd.grad(ours, (hidden, head))
    each = functional.cross_entropy(hidden @ head.T, targets, reduction="none")
    theirs = (each * weights).sum() / weights.sum()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for our_gradient, their_gradient in zip(gradients, torch.autograd.grad(theirs, (hidden, head)), strict=True):
        torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-5, atol=1e-6)


def test_sigmoid_loss_is_the_formula_in_plain_loops() -> None:
    """Equation 1 of the paper, pair by pair; two rows with one text are true pairs of each other."""
    torch.manual_seed(0)
    pictures = functional.normalize(torch.randn(6, 8), dim=-1)
    texts = functional.normalize(torch.randn(6, 8), dim=-1)
    identity = torch.tensor([0, 1, 2, 3, 1, 5])
    total = 0.0
    for i in range(6):
        for j in range(6):
            logit = 10.0 * float(pictures[i] @ texts[j]) - 10.0
            sign = 1 if identity[i] == identity[j] else -1
            total += math.log(1 + math.exp(-sign * logit))
    ours = sigmoid_loss(pictures, texts, torch.tensor(10.0), torch.tensor(-10.0), identity)
    assert float(ours) == pytest.approx(total / 6, rel=1e-5)


def lessons() -> list[Lesson]:
    """Pictures with several turns, without a picture, with two pictures, and a dialogue."""
    turns = (("What is this?", "a red circle"), ("Where?", "left"), ("How many are there?", "3"))
    return [
        Lesson("many turns", (view(0),), turns),
        Lesson("no picture", (), (("hello", "hi there"),)),
        Lesson("two pictures", (view(1), view(2)), turns[:2]),
        Lesson("dialogue", (view(3),), turns, is_dialogue=True),
    ]


def separate_loss(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> torch.Tensor:
    """The same lessons one conversation at a time, with transformers' own loss."""
    total, count = torch.zeros(()), 0
    for lesson in lessons():
        for turns in [lesson.turns] if lesson.is_dialogue else [(turn,) for turn in lesson.turns]:
            messages = []
            for number, (question, answer) in enumerate(turns):
                messages += [user_message(question, len(lesson.views) * (number == 0)), assistant_message(answer)]
            encoded = encode_conversation(processor.tokenizer, messages, 100)
            ids = torch.tensor([encoded.ids])
            labels = torch.where(torch.tensor([encoded.supervised]), ids, -100)
            pixels = processor.image_processor(list(lesson.views), return_tensors="pt") if lesson.views else {}
            total = total + model(input_ids=ids, labels=labels, **pixels).loss * sum(encoded.supervised)
            count += sum(encoded.supervised)
    return total / count


def test_packed_lessons_equal_separate_conversations(
    tiny: tuple[LlavaForConditionalGeneration, LlavaProcessor],
) -> None:
    """Loss and every gradient of the packed batch equal transformers' on the conversations one by one."""
    model, processor = tiny
    objective = InstructObjective(model, processor, ["tower", "projector", "language"], longest=600)
    freeze_all_but(objective, objective.trained_parameters())
    packed = objective(**objective.collate(lessons()))["answer_loss"]
    packed.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    separate = separate_loss(model, processor)
    separate.backward()
    torch.testing.assert_close(packed, separate, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_each_part_trains_its_own_parameters(tiny: tuple[LlavaForConditionalGeneration, LlavaProcessor]) -> None:
    """The declared set of each part gets a gradient, all of it and nothing more."""
    model, processor = tiny
    for part in PREFIXES:
        objective = InstructObjective(model, processor, [part], longest=600)
        freeze_all_but(objective, objective.trained_parameters())
        model.zero_grad(set_to_none=True)
        objective(**objective.collate(lessons()))["answer_loss"].backward()
        moved = {name for name, p in objective.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert moved == objective.trained_parameters(), part


def test_a_lesson_too_long_is_named_and_pictures_are_never_cut(
    tiny: tuple[LlavaForConditionalGeneration, LlavaProcessor],
) -> None:
    """Later turns give way first; a single turn that does not fit is an error."""
    model, processor = tiny
    objective = InstructObjective(model, processor, ["projector"], longest=130)
    packed = objective.pack(lessons()[0])
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert int((packed.ids == image).sum()) == 100
    assert len(packed.ids) <= 130
    with pytest.raises(ValueError, match="wordy"):
        objective.pack(Lesson("wordy", (view(0),), (("What is this? " * 40, "red"),)))


def test_mixture_plan_is_fair_and_reproducible() -> None:
    """Every sample comes once before any comes twice; shares follow the weights; the seed decides all."""
    source, index = mixture_plan([10, 1000], [1.0, 3.0], 4000, seed=5)
    assert (source == 1).mean() == pytest.approx(0.75, abs=0.03)
    small = index[source == 0]
    assert all(sorted(small[i : i + 10]) == list(range(10)) for i in range(0, len(small) - 9, 10))
    again = mixture_plan([10, 1000], [1.0, 3.0], 4000, seed=5)
    assert (source == again[0]).all() and (index == again[1]).all()
    with pytest.raises(ValueError, match="source number 1 of the mixture is empty"):
        mixture_plan([10, 0], [1.0, 1.0], 10, seed=0)


def test_a_damaged_picture_names_its_row() -> None:
    """The message says which row of which shard."""
    row = PictureRow("photo/17", "mine-train", b"RIFF....WEBPnonsense", None, (), ())
    with pytest.raises(DataError, match="row photo/17 of mine-train"):
        DecodedPictures([row])[0]


def test_training_sees_pictures_as_the_processor_does(
    tiny: tuple[LlavaForConditionalGeneration, LlavaProcessor],
) -> None:
    """Resize and normalise of training equal the shipped processor's, or answers would differ after export."""
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 97, 131), dtype=np.uint8))
    theirs = tiny[1].image_processor(pixels, return_tensors="pt")["pixel_values"][0]
    ours = normalised(square(pixels, 160), tiny[1].image_processor)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1.01 / 127.5)


def test_views_are_mirrored_only_where_words_allow() -> None:
    """A sentence with left or right keeps its picture as it is."""
    assert not mirrors_safely("A dog to the LEFT of a cat") and mirrors_safely("A dog beside a cat")
    pixels = view(0)
    seen = [random_view(pixels, 160, np.random.default_rng(seed), 1.0, may_mirror=False) for seed in range(4)]
    assert all(one.shape == (3, 160, 160) for one in seen)
    assert sentence("a red circle on white") == "A red circle on white." and sentence("three") == "Three"


def test_scene_lessons_never_meet_the_evaluation() -> None:
    """A lesson names its seed, and seeds of training stay below those of evaluation."""
    lesson = SceneLessons(10, 160).sample(3, np.random.default_rng(0))
    assert lesson.name == "scene 3" and len(lesson.turns) >= 4 and lesson.views[0].shape == (3, 160, 160)


def test_scenes_of_named_kinds_take_turns() -> None:
    """In lessons and in pictures alike; without names a scene is what its seed makes it."""
    pictures = open_pictures(PictureSource(scenes=6, kinds=("count", "position"), weight=1), Path, 64)
    assert [pictures[place].label for place in range(6)] == ["count", "position"] * 3
    lessons, drawn = SceneLessons(2, 160, kinds=("count", "position")), SceneLessons(2, 160)
    generator = np.random.default_rng(0)
    assert "scene 1" == lessons.sample(1, generator).name == drawn.sample(1, generator).name
    assert not np.array_equal(lessons.sample(1, generator).views[0], drawn.sample(1, generator).views[0])
    assert np.array_equal(lessons.sample(0, generator).views[0], pixels_of(make_scene(0, 160, "count").image))
    with pytest.raises(ValidationError, match="kinds are said of scenes only, not of a folder"):
        PictureSource(folder="pictures", kinds=("count",), weight=1)


def test_a_checkpoint_without_a_weight_is_refused(tmp_path: Path) -> None:
    """A projector that is missing is an error, never a new random one."""
    from safetensors.torch import load_file, save_file

    folder = make_tiny_llava(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["multi_modal_projector.linear_1.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing keys.*multi_modal_projector"):
        load_llava(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="the weights are damaged"):
        load_llava(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"lacks tokenizer\.json"):
        load_llava(folder)
