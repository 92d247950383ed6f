"""Tiles are LLaVA-NeXT's: counts, pixels, picture tokens, losses and files equal transformers' own at any size."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from assistant.answering import Assistant, Request
from assistant.chat import EncodedConversation, encode_conversation
from assistant.checkpoint import load_llava, save_llava
from assistant.fusion import join, with_tiles
from assistant.models import ModelError
from assistant.pixels import pixels_of
from assistant.projectors import Llava, Projector, picture_features, picture_tokens
from assistant.tiles import Grid, Processor, cut, grids_of, most_tokens_per_picture, most_views, tokens_per_picture
from assistant.towers import load_tower, normalised
from serving.model_folder import read_model_folder
from tests.test_fusion import CLIP_KEYS, SIGLIP_KEYS, published_keys
from tests.tiny import make_tiny_joined, make_tiny_language_model, make_tiny_tokenizer
from training.feature_cache import FeatureCache
from training.objectives.instruct import PREFIXES, InstructObjective, Lesson, Part
from training.trainer import freeze_all_but

GRIDS: tuple[Grid, ...] = ((1, 2), (2, 1), (2, 2), (1, 3))
SIDE = 160
# Squares, wide and high ones, a sliver, just off a grid's own ratio, smaller than a tile and larger than every grid.
SIZES = ((160, 160), (320, 320), (97, 640), (700, 210), (13, 1400), (501, 499), (31, 40), (1200, 900), (160, 321))
Family = Literal["clip", "siglip"]
ALL: tuple[Part, ...] = ("tower", "projector", "language")


def make_tiny_tiled(family: Family, folder: Path, grids: Sequence[Grid] = GRIDS) -> tuple[Llava, Processor]:
    """A LLaVA of random weights that cuts tiles, saved in `folder`."""
    tiled = with_tiles(*make_tiny_joined(family, folder / "plain"), grids)
    save_llava(*tiled, folder / "tiled")
    return tiled


@pytest.fixture(scope="module", params=["clip", "siglip"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model with a class token (`default`), and of one without (`full`)."""
    folder = tmp_path_factory.mktemp(request.param)
    make_tiny_tiled(request.param, folder)
    return folder / "tiled"


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Llava, Processor]:
    return load_llava(folder)


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """Coarse noise, uint8 (3, H, W), of which something is left at any size."""
    coarse = np.random.default_rng([seed, height, width]).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return pixels_of(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def test_tokens_are_counted_as_the_processor_counts(loaded: tuple[Llava, Processor]) -> None:
    """Of many sizes by its formula, and of some by what it writes."""
    processor = loaded[1]
    random = np.random.default_rng(0)
    sizes = [tuple(int(2 ** random.uniform(2, 11)) for _ in "hw") for _ in range(3000)] + list(SIZES)
    counted = processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]
    assert [tokens_per_picture(processor, (size[0], size[1])) for size in sizes] == counted
    assert len(set(counted)) > 30
    assert max(counted) == most_tokens_per_picture(processor) == 100 + 20 * 21
    image = processor.image_token_id
    for size in SIZES:
        written = processor(images=[picture(*size)], text="<image>", return_tensors="pt")["input_ids"]
        assert int((written == image).sum()) == tokens_per_picture(processor, size), size
    with pytest.raises(ValueError, match="hang on the size"):
        tokens_per_picture(processor)


def test_the_tower_sees_what_the_processor_makes(loaded: tuple[Llava, Processor]) -> None:
    """Base view and tiles of each picture, before and after normalising."""
    processor, pictures = loaded[1], [picture(*size) for size in SIZES]
    views, sizes = cut(processor, pictures)
    assert sizes is not None and sizes.tolist() == [list(size) for size in SIZES]
    assert views.dtype == torch.uint8
    theirs = [processor.image_processor([each], return_tensors="pt")["pixel_values"][0] for each in pictures]
    torch.testing.assert_close(normalised(views, processor.image_processor), torch.cat(theirs), rtol=0, atol=1e-5)
    assert max(len(each) for each in theirs) == most_views(processor) == 5


def test_picture_tokens_are_those_of_transformers(loaded: tuple[Llava, Processor]) -> None:
    """Rows of patches without what is black beside the picture, a newline behind each, picture behind picture."""
    model, processor = loaded
    pictures = [picture(*size) for size in SIZES]
    views, sizes = cut(processor, pictures)
    with torch.no_grad():
        ours = picture_tokens(model, picture_features(model, normalised(views, processor.image_processor)), sizes)
        batch = processor.image_processor(pictures, return_tensors="pt")
        theirs = torch.cat(list(model.get_image_features(**batch).pooler_output))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert len(ours) == sum(tokens_per_picture(processor, size) for size in SIZES)
    with pytest.raises(ValueError, match="sizes of pictures are for a model that reads tiles"):
        picture_tokens(model, picture_features(model, normalised(views[:1], processor.image_processor)))


def lessons() -> list[Lesson]:
    """Several turns about a wide picture, none, two of different sizes, a dialogue about a high one, a small square."""
    turns = (("What is this?", "a red circle"), ("Where?", "left"), ("How many are there?", "3"))
    return [
        Lesson("many turns", (picture(90, 640),), turns),
        Lesson("no picture", (), (("hello", "hi there"),)),
        Lesson("two pictures", (picture(300, 300), picture(40, 33)), turns[:2]),
        Lesson("dialogue", (picture(500, 180),), turns, is_dialogue=True),
        Lesson("square", (picture(160, 160),), turns[1:2]),
    ]


def encoded(processor: Processor, lesson: Lesson) -> list[EncodedConversation]:
    """The conversations of `lesson`, whose tokens are those that the processor itself writes."""
    counts = [tokens_per_picture(processor, (view.shape[1], view.shape[2])) for view in lesson.views]
    made = []
    for messages in lesson.conversations():
        one = encode_conversation(processor.tokenizer, messages, counts)
        text = processor.apply_chat_template(messages, chat_template=processor.chat_template, tokenize=False)
        written = processor(text=text, images=list(lesson.views) or None, add_special_tokens=False)["input_ids"][0]
        assert one.ids == list(written) and one.pictures == tuple(counts)
        made.append(one)
    return made


def separate_loss(model: Llava, processor: Processor) -> Tensor:
    """The lessons one conversation at a time, with transformers' own loss."""
    total, count = torch.zeros(()), 0
    for lesson in lessons():
        for one in encoded(processor, lesson):
            ids = torch.tensor([one.ids])
            labels = torch.where(torch.tensor([one.supervised]), ids, -100)
            seen = processor.image_processor(list(lesson.views), return_tensors="pt") if lesson.views else {}
            total = total + model(input_ids=ids, labels=labels, **seen).loss * sum(one.supervised)
            count += sum(one.supervised)
    return total / count


def objective_on(folder: Path, trains: Sequence[Part] = ALL, **said: Any) -> InstructObjective:
    """A new objective whose declared parameters train, and no other."""
    objective = InstructObjective(*load_llava(folder), trains, longest=1500, **said)
    freeze_all_but(objective, objective.trained_parameters())
    return objective.train()


@pytest.mark.parametrize("packing", [False, True])
def test_loss_and_gradients_are_those_of_transformers(folder: Path, packing: bool) -> None:
    """Of one batch with turns side by side, against the conversations one by one."""
    objective, (witness, processor) = objective_on(folder, packing=packing), load_llava(folder)
    ours = objective(**objective.collate(lessons()))["answer_loss"]
    ours.backward()
    theirs = separate_loss(witness.train(), processor)
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    expected = dict(witness.named_parameters())
    for name in objective.trained_parameters():
        own = name.removeprefix("model.")
        gradient = dict(objective.model.named_parameters())[own].grad
        assert gradient is not None and expected[own].grad is not None, name
        torch.testing.assert_close(gradient, expected[own].grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("trains", [*[(part,) for part in PREFIXES], ALL])
def test_two_steps_move_what_is_declared_and_nothing_else(folder: Path, trains: tuple[Part, ...]) -> None:
    """The newline is one of the projector's."""
    objective = objective_on(folder, trains)
    before = {name: p.detach().clone() for name, p in objective.named_parameters()}
    optimiser = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        optimiser.zero_grad()
        objective(**objective.collate(lessons()))["answer_loss"].backward()
        optimiser.step()
    moved = {name for name, p in objective.named_parameters() if not p.equal(before[name])}
    assert moved == objective.trained_parameters()
    assert ("model.model.image_newline" in moved) == ("projector" in trains)


def test_kept_features_change_nothing(folder: Path) -> None:
    """Each tile is kept by its own content: what is black beside two pictures is seen once."""
    cache = FeatureCache(2**30)
    kept, fresh = objective_on(folder, ("projector",), features=cache), objective_on(folder, ("projector",))
    expected = fresh(**fresh.collate(lessons()))["answer_loss"]
    for _ in range(2):
        assert torch.equal(kept(**kept.collate(lessons()))["answer_loss"], expected)
    views, _ = cut(kept.processor, [view for lesson in lessons() for view in lesson.views])
    assert cache.computed == len(torch.unique(views.flatten(1), dim=0))


def test_a_batch_is_answered_as_each_picture_alone(loaded: tuple[Llava, Processor], folder: Path) -> None:
    """Of several sizes, several pictures and none; alone, transformers answers with no code of ours."""
    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    images = [Image.fromarray(picture(*size).permute(1, 2, 0).numpy()) for size in SIZES[:5]]
    requests = [Request("What is this?", (image,)) for image in images]
    requests += [Request("Which is larger?", (images[0], images[2])), Request("Hello")]
    alone = []
    for request in requests:
        content = [{"type": "image"}] * len(request.pictures) + [{"type": "text", "text": request.question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        said = {"images": list(request.pictures) or None, "add_special_tokens": False, "return_tensors": "pt"}
        inputs = processor(text=text, **said)
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        alone.append(processor.decode(ids, skip_special_tokens=True).strip())
    assert Assistant(*loaded).answer_batch(requests, max_new_tokens=6) == alone
    assert len(set(alone)) > 3


def test_the_files_are_those_that_llava_hf_publishes(folder: Path, loaded: tuple[Llava, Processor]) -> None:
    """As in llava-hf/llava-v1.6-*: the keys of LLaVA-1.5 and one more, and a configuration that names the grids."""
    model, processor = loaded
    clip = model.config.vision_config.model_type == "clip_vision_model"
    keys = published_keys(CLIP_KEYS if clip else SIGLIP_KEYS, 3) | {"image_newline"}
    assert set(load_file(folder / "model.safetensors")) == keys
    config = model.config.to_dict()
    assert config["model_type"] == "llava_next" and config["use_image_newline_parameter"]
    assert config["image_grid_pinpoints"] == [[rows * SIDE, columns * SIDE] for rows, columns in GRIDS]
    assert config["vision_feature_select_strategy"] == ("default" if clip else "full")
    assert type(processor).__name__ == "LlavaNextProcessor" and tuple(grids_of(processor)) == GRIDS
    assert processor.image_processor.size["shortest_edge"] == processor.image_processor.crop_size["height"] == SIDE
    facts = read_model_folder(folder)
    assert facts.read_by_vllm and facts.picture_token == "<image>"
    tower = load_tower(folder)
    assert tower.image_side == SIDE and not hasattr(tower.image_processor, "image_grid_pinpoints")


def test_a_published_checkpoint_comes_back_as_it_went(tmp_path: Path) -> None:
    """One made by transformers alone, shaped as llava-hf/llava-v1.6-mistral-7b-hf: CLIP, and words untied."""
    model, processor = make_tiny_tiled("clip", tmp_path / "ours", ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)))
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    again = type(model)(model.config)
    published = {
        "image_newline": again.model.image_newline,
        **{f"language_model.model.{name}": value for name, value in again.model.language_model.state_dict().items()},
        "language_model.lm_head.weight": again.lm_head.weight,
        **{f"multi_modal_projector.{n}": value for n, value in again.model.multi_modal_projector.state_dict().items()},
        **{f"vision_tower.vision_model.{n}": value for n, value in again.model.vision_tower.state_dict().items()},
    }
    save_llava(model, processor, tmp_path / "published")
    save_file(
        {name: value.detach().contiguous().clone() for name, value in published.items()},
        tmp_path / "published" / "model.safetensors",
    )
    again.config.save_pretrained(tmp_path / "published")
    loaded, read = load_llava(tmp_path / "published")
    for name, value in again.state_dict().items():
        assert loaded.state_dict()[name].equal(value), name
    save_llava(loaded, read, tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == published.keys()
    assert all(saved[name].equal(value.detach()) for name, value in published.items())


def test_what_cannot_read_tiles_says_so(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer(tmp_path)
    language_model = make_tiny_language_model(tokenizer)
    (tmp_path / "dinov2").mkdir()
    with pytest.raises(ModelError, match=r"for a CLIP or SigLIP tower .* this is a Dinov2Model for 160 pixels"):
        with_tiles(*make_tiny_joined("dinov2", tmp_path / "dinov2"), GRIDS)
    (tmp_path / "siglip").mkdir()
    plain = make_tiny_joined("siglip", tmp_path / "siglip")
    tower = load_tower(tmp_path / "siglip").model
    projectors: tuple[tuple[Projector, str], ...] = (("linear", "LlavaForCondition"), ("pixel-shuffle", "AyaVision"))
    for projector, name in projectors:
        with pytest.raises(ModelError, match=f"this is a {name}.* with a {projector} one"):
            join(tower, language_model, tokenizer, projector=projector, tiles=GRIDS)
    with pytest.raises(ModelError, match=r"2,140 tokens, and the language model reads 1,024 .* take smaller grids"):
        with_tiles(*plain, [(2, 2), (4, 5)])
    for grids in ([(0, 2)], [(2, 2), (1, -1)]):
        with pytest.raises(ModelError, match="so many rows and columns of tiles, one or more each"):
            with_tiles(*plain, grids)
    tiled = with_tiles(*plain, [(1, 2)])
    with pytest.raises(ModelError, match="has none yet, and this is a LlavaNext"):
        with_tiles(*tiled, [(2, 2)])
