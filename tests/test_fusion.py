"""A tower of each family joined to a language model: the published layout, the same answers, what is left unused."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Dinov2Config,
    Dinov2Model,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from assistant.fusion import calibrate_projector, join, unused_tower_parameters
from assistant.models import ModelError
from assistant.towers import ResNetShape, Tower, ViTShape, load_tower, new_image_processor, new_tower
from tests.test_serving_parity import ask_transformers, prompts
from tests.tiny import TowerFamily, make_tiny_joined, make_tiny_language_model, make_tiny_tokenizer
from training.objectives.instruct import tokens_per_picture

FAMILIES: tuple[TowerFamily, ...] = get_args(TowerFamily)
PATCHES = 100


@dataclass(frozen=True)
class Joined:
    family: TowerFamily
    folder: Path
    model: LlavaForConditionalGeneration
    processor: LlavaProcessor


@pytest.fixture(scope="module", params=FAMILIES)
def joined(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Joined:
    folder = tmp_path_factory.mktemp("joined")
    return Joined(request.param, folder, *make_tiny_joined(request.param, folder))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def pixels(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 160, 160, generator=torch.Generator().manual_seed(1))


def test_what_is_saved_answers_as_what_was_joined(joined: Joined) -> None:
    """Loaded by transformers with no code of ours: greedy answers with 0, 1 and 2 pictures, and their likelihoods."""
    model = AutoModelForImageTextToText.from_pretrained(joined.folder).eval()
    processor = AutoProcessor.from_pretrained(joined.folder)
    answers = []
    for prompt in prompts()[:3]:
        loaded = ask_transformers(model, processor, prompt)
        here = ask_transformers(joined.model, joined.processor, prompt)
        assert loaded.prompt_ids == here.prompt_ids
        assert loaded.ids == here.ids
        assert loaded.logprobs == pytest.approx(here.logprobs, abs=1e-5)
        image_token = joined.model.config.image_token_index
        assert here.prompt_ids.count(image_token) == PATCHES * len(prompt.pictures)
        answers.append(here.logprobs)
    assert answers[0] != answers[1] != answers[2]  # pictures matter, or this would prove nothing about the tower


def test_a_picture_is_its_patches_and_nothing_else(joined: Joined) -> None:
    """LLaVA-1.5 looks through the last layer but one, and drops a class token."""
    config = joined.model.config
    assert config.image_seq_length == PATCHES == tokens_per_picture(joined.processor)
    assert config.vision_feature_layer == -2
    assert config.vision_feature_select_strategy == ("full" if joined.family == "siglip" else "default")
    assert joined.processor.vision_feature_select_strategy == config.vision_feature_select_strategy
    assert joined.processor.num_additional_image_tokens == (0 if joined.family == "siglip" else 1)
    tower = load_tower(joined.folder).model.eval()
    with torch.no_grad():
        hidden = tower(pixels(), output_hidden_states=True).hidden_states[-2]
        seen = joined.model.get_image_features(pixels()).pooler_output
        expected = joined.model.model.multi_modal_projector(hidden[:, -PATCHES:])
    torch.testing.assert_close(torch.stack(list(seen)), expected)


def test_the_tower_comes_out_of_a_llava_again(joined: Joined) -> None:
    """The same weights as went in: the same patches, and the same mean and deviation."""
    torch.manual_seed(0)  # as when it was made
    tower = new_tower(ViTShape(family=joined.family, width=64, layers=3, heads=2, patch=16, image_side=160)).eval()
    loaded = load_tower(joined.folder).eval()
    assert type(loaded.model) is type(tower.model)
    with torch.no_grad():
        assert torch.equal(loaded(pixels()).patches, tower(pixels()).patches)
    views = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded.normalise(views), tower.normalise(views))


def published_keys(tower: set[str], layers: int) -> set[str]:
    """The keys that llava-hf publishes, for a tower of `layers` and a language model of two layers, tied."""
    both = ("weight", "bias")
    keys = {f"multi_modal_projector.linear_{number}.{kind}" for number in (1, 2) for kind in both}
    parts = ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]
    parts += [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")]
    keys |= {
        f"vision_tower.vision_model.encoder.layers.{n}.{p}.{k}" for n in range(layers) for p in parts for k in both
    }
    keys |= {f"vision_tower.vision_model.{name}" for name in tower}
    keys |= {f"vision_tower.vision_model.post_layernorm.{kind}" for kind in both}
    parts = ["input_layernorm", "post_attention_layernorm"]
    parts += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    parts += [f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")]
    keys |= {f"language_model.model.layers.{number}.{part}.weight" for number in range(2) for part in parts}
    return keys | {"language_model.model.embed_tokens.weight", "language_model.model.norm.weight"}


CLIP_KEYS = {"embeddings.class_embedding", "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"}
CLIP_KEYS |= {"pre_layrnorm.weight", "pre_layrnorm.bias"}
SIGLIP_KEYS = {"embeddings.patch_embedding.weight", "embeddings.patch_embedding.bias"}
SIGLIP_KEYS |= {"embeddings.position_embedding.weight"}


def test_the_keys_are_those_that_llava_hf_publishes(joined: Joined) -> None:
    """As in llava-hf/llava-1.5-7b-hf (CLIP). With DINOv2 the tower has the keys of facebook/dinov2-*."""
    keys = set(load_file(joined.folder / "model.safetensors"))
    if joined.family == "dinov2":
        own = {f"vision_tower.{name}" for name in dinov2_keys(3)}
        assert {key for key in keys if key.startswith("vision_tower.")} == own
    else:
        assert keys == published_keys(CLIP_KEYS if joined.family == "clip" else SIGLIP_KEYS, 3)


def dinov2_keys(layers: int) -> set[str]:
    """The keys of facebook/dinov2-base."""
    both = ("weight", "bias")
    parts = [f"attention.attention.{name}" for name in ("query", "key", "value")]
    parts += ["attention.output.dense", "mlp.fc1", "mlp.fc2", "norm1", "norm2"]
    keys = {f"encoder.layer.{number}.{part}.{kind}" for number in range(layers) for part in parts for kind in both}
    keys |= {f"encoder.layer.{number}.layer_scale{which}.lambda1" for number in range(layers) for which in (1, 2)}
    keys |= {f"embeddings.{name}" for name in ("cls_token", "mask_token", "position_embeddings")}
    return keys | {
        f"{name}.{kind}" for name in ("embeddings.patch_embeddings.projection", "layernorm") for kind in both
    }


def test_unused_parameters_are_those_without_a_gradient(joined: Joined) -> None:
    model = joined.model
    model.zero_grad()
    torch.stack(list(model.get_image_features(pixels()).pooler_output)).square().mean().backward()
    prefix = "model.vision_tower."
    idle = {name for name, p in model.named_parameters() if name.startswith(prefix) and p.grad is None}
    model.zero_grad()
    assert unused_tower_parameters(model) == idle
    assert any(".2." in name for name in idle) and not any(".1." in name for name in idle)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_calibrated_projector_gives_centred_picture_tokens(
    family: TowerFamily, tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.manual_seed(0)
    tower = new_tower(ViTShape(family, 32, 2, 2, 16, 160))
    model, _ = join(tower.model, make_tiny_language_model(tokenizer), tokenizer, tower.image_processor)
    calibrate_projector(model.eval(), pixels(8))
    with torch.no_grad():
        seen = torch.cat(list(model.get_image_features(pixels(8)).pooler_output))
    torch.testing.assert_close(seen.mean(0), torch.zeros(64), rtol=0, atol=1e-3)
    assert float(seen.std(0).min()) > 0.3 and float(seen.std(0).max()) < 3


def test_side_mean_and_deviation_are_the_towers_own(tokenizer: PreTrainedTokenizerFast) -> None:
    """facebook/dinov2-* were made for 518 pixels and are published with a processor that crops 224."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 16}
    own = new_image_processor("dinov2", 64)
    own.image_mean, own.do_center_crop = [0.1, 0.2, 0.3], True
    own.size = {"shortest_edge": 80}
    tower = Tower(Dinov2Model(Dinov2Config(**sizes, image_size=160)), own)
    model, processor = join(tower.model, make_tiny_language_model(tokenizer), tokenizer, tower.image_processor)
    assert model.config.image_seq_length == tokens_per_picture(processor) == 16
    assert list(processor.image_processor.image_mean) == [0.1, 0.2, 0.3]
    assert list(processor.image_processor.image_std) == list(own.image_std)
    wide = torch.zeros(3, 20, 200, dtype=torch.uint8)
    wide[2, :, 180:] = 255
    made = processor.image_processor([wide], return_tensors="pt")["pixel_values"]
    assert made.shape == (1, 3, 64, 64)
    assert made[0, 2, 0, -1] == made.max()  # the edge is still there: training squeezes pictures and crops none


def test_what_cannot_be_joined_says_so(tokenizer: PreTrainedTokenizerFast) -> None:
    language_model = make_tiny_language_model(tokenizer)
    for shape in (ResNetShape(18, 64), ViTShape("vit", 32, 2, 2, 16, 64)):
        with pytest.raises(ModelError, match="cannot be joined to a language model; these can: CLIPVisionModel"):
            join(new_tower(shape).model, language_model, tokenizer)
    tower = new_tower(ViTShape("clip", 32, 2, 2, 16, 64)).model
    with pytest.raises(ModelError, match="makes 80 pixels and the tower sees 64 in a LLaVA"):
        join(tower, language_model, tokenizer, new_image_processor("clip", 80))
    processor = new_image_processor("clip", 64)
    processor.do_center_crop, processor.size = False, {"height": 64, "width": 80}
    with pytest.raises(ModelError, match="no square of one size"):
        join(tower, language_model, tokenizer, processor)
