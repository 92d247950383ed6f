"""Towers against transformers' own forward, masking that hides what it should, and files that everybody loads."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    BaseImageProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from assistant.models import ModelError
from assistant.towers import (
    ResNetShape,
    TextShape,
    Tower,
    TowerOutput,
    ViTShape,
    clip_tokenizer,
    load_tower,
    new_image_processor,
    new_pair,
    new_tower,
)
from tests.tiny import make_tiny_tokenizer
from training.data.views import square

Kind = Literal["clip", "siglip", "siglip without head", "dinov2", "dinov2 with registers", "vit", "resnet"]
TRANSFORMERS: tuple[Kind, ...] = ("clip", "siglip", "siglip without head", "dinov2", "dinov2 with registers", "vit")
ALL: tuple[Kind, ...] = (*TRANSFORMERS, "resnet")
SIDE, PATCH, WIDTH, LAYERS, REGISTERS = 32, 8, 32, 2, 3
PATCHES = (SIDE // PATCH) ** 2
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
SIZES |= {"patch_size": PATCH, "image_size": SIDE}


def tiny_tower(kind: Kind) -> Tower:
    """A tower of two layers; everything that starts at zero or one is moved from there, or it would hide mistakes."""
    torch.manual_seed(0)
    match kind:
        case "siglip without head":
            config = SiglipVisionConfig(**SIZES, intermediate_size=4 * WIDTH, vision_use_head=False)
            tower = Tower(SiglipVisionModel(config), new_image_processor("siglip", SIDE))
        case "dinov2 with registers":
            registers = Dinov2WithRegistersConfig(**SIZES, num_register_tokens=REGISTERS)
            tower = Tower(Dinov2WithRegistersModel(registers), new_image_processor("dinov2", SIDE))
        case "resnet":
            resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 32], depths=[1, 1, 1], layer_type="basic")
            tower = Tower(ResNetModel(resnet), new_image_processor("resnet", SIDE))
        case _:
            tower = new_tower(ViTShape(kind, WIDTH, LAYERS, 2, PATCH, SIDE))
    move(tower)
    return tower.eval()


def move(model: nn.Module) -> None:
    """Add noise to every parameter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def pixels(height: int = SIDE, width: int = SIDE, count: int = 2) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(height + width))


def of_transformers(model: PreTrainedModel, given: Tensor) -> TowerOutput:
    """What transformers' own forward makes of `given`, laid out as ours."""
    match model:
        case CLIPVisionModel():
            out = model(given, interpolate_pos_encoding=True)
            # Its hidden state is from before the last norm.
            return TowerOutput(model.post_layernorm(out.last_hidden_state)[:, 1:], out.pooler_output)
        case SiglipVisionModel():
            out = model(given, interpolate_pos_encoding=True)
            pooled = out.last_hidden_state.mean(1) if out.pooler_output is None else out.pooler_output
            return TowerOutput(out.last_hidden_state, pooled)
        case ViTModel():
            out = model(given, interpolate_pos_encoding=True)
            return TowerOutput(out.last_hidden_state[:, 1:], out.last_hidden_state[:, 0])
        case ResNetModel():
            out = model(given)
            return TowerOutput(out.last_hidden_state.flatten(2).mT, out.pooler_output[:, :, 0, 0])
        case _:
            out = model(given)
            behind = 1 + getattr(model.config, "num_register_tokens", 0)
            return TowerOutput(out.last_hidden_state[:, behind:], out.pooler_output)


def assert_same(ours: TowerOutput, theirs: TowerOutput) -> None:
    """To the bit."""
    torch.testing.assert_close(ours.patches, theirs.patches, rtol=0, atol=0)
    torch.testing.assert_close(ours.pooled, theirs.pooled, rtol=0, atol=0)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 48), (24, 56)])
@pytest.mark.parametrize("kind", ALL)
@torch.no_grad()
def test_it_gives_what_transformers_gives(kind: Kind, height: int, width: int) -> None:
    """At the size it was made for, and at others, where positions are interpolated."""
    tower = tiny_tower(kind)
    given = pixels(height, width)
    ours = tower(given)
    assert_same(ours, of_transformers(tower.model, given))
    rows, columns = tower.grid(height, width)
    assert ours.patches.shape == (2, rows * columns, tower.width)
    assert ours.pooled.shape == (2, tower.width)


@pytest.mark.parametrize("kind", TRANSFORMERS)
@torch.no_grad()
def test_features_are_those_that_a_language_model_looks_at(kind: Kind) -> None:
    """transformers' hidden states of the layer before the last one, the leading tokens left out."""
    tower = tiny_tower(kind)
    leading = {"clip": 1, "siglip": 0, "siglip without head": 0, "dinov2": 1, "vit": 1}.get(kind, 1 + REGISTERS)
    theirs = tower.model(pixels(), output_hidden_states=True).hidden_states[-2][:, leading:]
    ours = tower.features(pixels())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert ours.shape == (2, PATCHES, WIDTH) and len(tower.layers_looked_at) == LAYERS - 1


def test_a_resnet_has_no_such_features() -> None:
    with pytest.raises(ValueError, match="no patch tokens"):
        tiny_tower("resnet").features(pixels())


@pytest.mark.parametrize("kind", ALL)
@torch.no_grad()
def test_a_size_that_the_patches_do_not_divide(kind: Kind) -> None:
    """As in google/siglip-so400m-patch14-384: 27 patches of 14 in 384 pixels."""
    tower = tiny_tower(kind)
    given = pixels(35, 42)
    assert_same(tower(given), of_transformers(tower.model, given))
    rows, columns = tower.grid(35, 42)
    assert tower(given).patches.shape[1] == rows * columns


def test_geometry() -> None:
    tower = tiny_tower("dinov2")
    assert (tower.width, tower.patch_size, tower.image_side, tower.has_patch_tokens) == (WIDTH, PATCH, SIDE, True)
    assert tower.grid(48, 32) == (6, 4)
    resnet = new_tower(ResNetShape(18, 64))
    assert (resnet.width, resnet.patch_size, resnet.image_side, resnet.has_patch_tokens) == (512, 32, 64, False)
    assert resnet.grid(64, 96) == (2, 3)
    assert new_tower(ResNetShape(50, 64)).width == 2048


def test_a_picture_smaller_than_a_patch() -> None:
    with pytest.raises(ValueError, match="32 x 7 pixels is smaller than a patch of 8"):
        tiny_tower("vit")(pixels(7, 32))


# --- patches that are left out, and patches that are hidden


@pytest.mark.parametrize("kind", TRANSFORMERS)
@torch.no_grad()
def test_all_patches_visible_is_the_whole_picture(kind: Kind) -> None:
    tower, given = tiny_tower(kind), pixels()
    assert_same(tower(given, visible=torch.arange(PATCHES).expand(2, -1)), tower(given))


@pytest.mark.parametrize("kind", TRANSFORMERS)
@torch.no_grad()
def test_visible_patches_come_in_the_order_asked_for(kind: Kind) -> None:
    tower, given = tiny_tower(kind), pixels()
    visible = torch.tensor([[5, 2, 11], [0, 15, 7]])
    rising = visible.sort(1)
    asked, sorted_ = tower(given, visible=visible), tower(given, visible=rising.values)
    assert asked.patches.shape == (2, 3, WIDTH)
    expected = asked.patches.gather(1, rising.indices[..., None].expand(-1, -1, WIDTH))
    torch.testing.assert_close(sorted_.patches, expected)
    torch.testing.assert_close(sorted_.pooled, asked.pooled)


@pytest.mark.parametrize("kind", ["dinov2", "dinov2 with registers", "vit"])
@torch.no_grad()
def test_patches_left_out_are_patches_that_nobody_attends_to(kind: Kind) -> None:
    """Transformers, given all patches and an attention mask over those that are not visible, says the same."""
    tower, given = tiny_tower(kind), pixels()
    visible = torch.tensor([[1, 2, 8, 13], [0, 3, 4, 15]])
    leading = 1 + (REGISTERS if kind == "dinov2 with registers" else 0)
    mask = torch.zeros(2, leading + PATCHES, dtype=torch.long)
    mask[:, :leading] = 1
    mask.scatter_(1, visible + leading, 1)
    theirs = tower.model(given, attention_mask=mask).last_hidden_state
    ours = tower(given, visible=visible)
    kept = theirs[:, leading:].gather(1, visible[..., None].expand(-1, -1, WIDTH))
    torch.testing.assert_close(ours.patches, kept, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.pooled, theirs[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", TRANSFORMERS)
@torch.no_grad()
def test_pixels_of_patches_left_out_change_nothing(kind: Kind) -> None:
    tower, given = tiny_tower(kind), pixels()
    visible = torch.tensor([[0, 5], [0, 10]])  # 0, 5 and 10 lie on the diagonal of a 4 x 4 grid
    seen = tower(given, visible=visible)
    others = given.clone()
    others[:, :, :PATCH, PATCH:] += 3.0  # the rest of the first row of patches
    assert_same(tower(others, visible=visible), seen)
    others[0, :, PATCH : 2 * PATCH, PATCH : 2 * PATCH] += 3.0  # patch 5
    changed = tower(others, visible=visible)
    assert not torch.allclose(changed.pooled[0], seen.pooled[0], atol=1e-4)
    assert torch.equal(changed.pooled[1], seen.pooled[1])


@pytest.mark.parametrize("kind", ["dinov2", "dinov2 with registers"])
@torch.no_grad()
def test_hidden_patches_are_those_that_transformers_masks(kind: Kind) -> None:
    tower, given = tiny_tower(kind), pixels(24, 56)
    hidden = torch.rand(2, 21, generator=torch.Generator().manual_seed(3)) < 0.4
    theirs = tower.model(given, bool_masked_pos=hidden)
    ours = tower(given, hidden=hidden, mask_token=tower.own_mask_token())
    torch.testing.assert_close(ours.patches, theirs.last_hidden_state[:, -21:])
    torch.testing.assert_close(ours.pooled, theirs.pooler_output)


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_a_hidden_patch_shows_the_mask_token_instead_of_its_pixels(kind: Kind) -> None:
    tower, given = tiny_tower(kind), pixels()
    hidden = torch.zeros(2, PATCHES, dtype=torch.bool)
    hidden[0, 0] = True
    token = torch.randn(WIDTH, requires_grad=True)
    masked = tower(given, hidden=hidden, mask_token=token)
    others = given.clone()
    others[0, :, :PATCH, :PATCH] += 3.0
    assert_same(tower(others, hidden=hidden, mask_token=token), masked)
    assert_same(tower(given, hidden=hidden, mask_token=token[None]), masked)
    whole = tower(given)
    assert torch.equal(masked.pooled[1], whole.pooled[1])  # nothing is hidden in the second picture
    assert not torch.allclose(masked.pooled[0], whole.pooled[0], atol=1e-4)
    masked.patches[0].sum().backward()
    assert token.grad is not None and token.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["clip", "dinov2 with registers"])
@torch.no_grad()
def test_hidden_and_visible_together(kind: Kind) -> None:
    """`hidden` counts all patches, the visible ones among them."""
    tower, given = tiny_tower(kind), pixels()
    hidden = torch.zeros(2, PATCHES, dtype=torch.bool)
    hidden[:, 5] = True
    token = torch.randn(WIDTH)
    together = tower(given, torch.arange(PATCHES).expand(2, -1), hidden, token)
    assert_same(together, tower(given, hidden=hidden, mask_token=token))


def test_only_dinov2_has_a_mask_token_of_its_own() -> None:
    for kind in ALL:
        token = tiny_tower(kind).own_mask_token()
        assert (token is not None) == kind.startswith("dinov2")
        assert token is None or token.shape == (1, WIDTH)


def test_what_cannot_be_masked_says_so() -> None:
    resnet, vit = tiny_tower("resnet"), tiny_tower("vit")
    assert not resnet.has_patch_tokens
    with pytest.raises(ValueError, match="ResNet has no patch tokens"):
        resnet(pixels(), visible=torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="ResNet has no patch tokens"):
        resnet(pixels(), hidden=torch.zeros(2, 4, dtype=torch.bool), mask_token=torch.zeros(WIDTH))
    with pytest.raises(ValueError, match="need a mask_token"):
        vit(pixels(), hidden=torch.zeros(2, PATCHES, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"hidden is \(2, 9\) and there are \(2, 16\) patches"):
        vit(pixels(), hidden=torch.zeros(2, 9, dtype=torch.bool), mask_token=torch.zeros(WIDTH))


# --- pixels, layers, training


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "vit", "resnet"])
def test_pixels_are_normalised_as_the_image_processor_does_it(kind: Kind) -> None:
    tower = tiny_tower(kind)
    views = torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = tower.image_processor(list(views), return_tensors="pt")["pixel_values"]
    ours = tower.normalise(views)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=2e-6)


def test_a_processor_that_does_not_normalise() -> None:
    processor = new_image_processor("clip", SIDE)
    processor.do_normalize = False
    tower = Tower(tiny_tower("clip").model, processor)
    assert float(tower.normalise(torch.full((1, 3, 8, 8), 51, dtype=torch.uint8)).max()) == pytest.approx(0.2)


@pytest.mark.parametrize("kind", ALL)
def test_a_new_processor_sees_what_training_sees(kind: Kind) -> None:
    """The whole picture, squeezed into the square: what stands at its edges is there."""
    tower = tiny_tower(kind)
    wide = torch.zeros(3, 20, 200, dtype=torch.uint8)
    wide[0, :, :20], wide[2, :, 180:] = 255, 255
    made = tower.image_processor([wide], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(made, tower.normalise(square(wide, SIDE)[None]), rtol=1e-6, atol=2e-6)
    assert made.shape == (1, 3, SIDE, SIDE)
    assert made[0, 0, 0, 0] == made[0, 0].max() and made[0, 2, 0, -1] == made[0, 2].max()


@pytest.mark.parametrize("kind", ALL)
def test_every_parameter_has_its_layer(kind: Kind) -> None:
    tower = tiny_tower(kind)
    behind = len(tower.layers) + 1
    assert behind == (4 if kind == "resnet" else LAYERS + 1)
    for name, _ in tower.named_parameters():
        numbered = re.search(r"\.(?:layers|layer|stages)\.(\d+)\.", name)
        before = ".embed" in name or "pre_layrnorm" in name
        expected = int(numbered[1]) + 1 if numbered else 0 if before else behind
        assert tower.layer_of(name) == expected, name
    with pytest.raises(ValueError, match=r"model\.nothing is no parameter"):
        tower.layer_of("model.nothing")


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_checkpointing_recomputes_and_changes_no_gradient(kind: Kind) -> None:
    tower, given = tiny_tower(kind).train(), pixels()
    calls: list[int] = []
    # Before its MLP: going back, the recomputation stops as soon as nothing is missing any more.
    tower.layers[0].get_submodule("mlp").register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients() -> dict[str, Tensor]:
        calls.clear()
        tower.zero_grad()
        output = tower(given, visible=torch.tensor([[0, 3, 9], [1, 2, 4]]))
        (output.patches.square().mean() + output.pooled.square().mean()).backward()
        return {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}

    plain = gradients()
    assert len(calls) == 1
    tower.model.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients()
    assert len(calls) == 2
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", ALL)
def test_every_parameter_but_the_mask_token_takes_part(kind: Kind) -> None:
    """A parameter that no output depends on would stop distributed training."""
    tower = tiny_tower(kind).train()
    output = tower(pixels())
    (output.patches.square().mean() + output.pooled.square().mean()).backward()
    idle = {name for name, parameter in tower.named_parameters() if parameter.grad is None}
    assert idle == ({"model.embeddings.mask_token"} if kind.startswith("dinov2") else set())


def test_stochastic_depth_drops_layers_in_training_alone() -> None:
    torch.manual_seed(0)
    tower = new_tower(ViTShape("dinov2", WIDTH, 4, 2, PATCH, SIDE, drop_path=0.5, layer_scale=1e-2))
    same = pixels(count=1).expand(6, -1, -1, -1)
    drawn = tower.train()(same).pooled
    assert any(not torch.allclose(drawn[0], row) for row in drawn[1:])
    still = tower.eval()(same).pooled
    torch.testing.assert_close(still, still[:1].expand(6, -1))
    assert float(tower.layers[0].get_parameter("layer_scale1.lambda1").detach().mean()) == pytest.approx(1e-2)


@pytest.mark.parametrize("family", ["clip", "siglip", "vit"])
def test_shapes_that_do_not_fit_are_refused(family: Literal["clip", "siglip", "vit"]) -> None:
    with pytest.raises(ValueError, match="no drop_path and no layer_scale"):
        ViTShape(family, WIDTH, 2, 2, PATCH, SIDE, drop_path=0.1)
    with pytest.raises(ValueError, match="no drop_path and no layer_scale"):
        ViTShape(family, WIDTH, 2, 2, PATCH, SIDE, layer_scale=1e-5)
    with pytest.raises(ValueError, match="32 does not divide into 3 heads"):
        ViTShape(family, WIDTH, 2, 3, PATCH, SIDE)
    with pytest.raises(ValueError, match="33 pixels do not divide into patches of 8"):
        ViTShape(family, WIDTH, 2, 2, PATCH, 33)


def test_a_model_that_is_no_tower_is_refused() -> None:
    with pytest.raises(ModelError, match=r"ResNetForImageClassification is no vision tower .* Dinov2Model"):
        Tower(ResNetForImageClassification(tiny_tower("resnet").model.config), new_image_processor("resnet", SIDE))
    with pytest.raises(ModelError, match="add_pooling_layer=False"):
        Tower(ViTModel(tiny_tower("vit").model.config), new_image_processor("vit", SIDE))


# --- files


@pytest.mark.parametrize("kind", ALL)
@torch.no_grad()
def test_a_saved_tower_is_loaded_by_transformers_and_by_us(kind: Kind, tmp_path: Path) -> None:
    tower, given = tiny_tower(kind), pixels()
    tower.save(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    theirs = AutoModel.from_pretrained(tmp_path).eval()
    assert type(theirs) is type(tower.model)
    assert_same(of_transformers(theirs, given), tower(given))
    assert_same(load_tower(tmp_path).eval()(given), tower(given))
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert processor.to_dict() == tower.image_processor.to_dict()


IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
OPENAI = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
TEXT_SIZES = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT_SIZES |= {"vocab_size": 50, "max_position_embeddings": 8}


def published_siglip(folder: Path) -> Tower:
    """google/siglip-base-patch16-224, tiny: both halves, safetensors."""
    vision = SiglipVisionConfig(**SIZES, intermediate_size=2 * WIDTH).to_dict()
    text = SiglipTextConfig(**TEXT_SIZES, projection_size=WIDTH).to_dict()
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    move(model)
    model.save_pretrained(folder)
    processor: dict[str, Any] = {"do_resize": True, "do_rescale": True, "do_normalize": True}
    processor |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3, "rescale_factor": 1 / 255}
    processor |= {"image_processor_type": "SiglipImageProcessor", "processor_class": "SiglipProcessor"}
    write_json(folder / "preprocessor_config.json", processor | {"size": {"height": SIDE, "width": SIDE}})
    return Tower(model.vision_model, new_image_processor("siglip", SIDE))


def published_clip(folder: Path) -> Tower:
    """openai/clip-vit-base-patch32, tiny: both halves, pickled weights with the positions, an old processor file."""
    config = CLIPConfig(
        text_config=TEXT_SIZES | {"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1},
        vision_config=SIZES | {"intermediate_size": 2 * WIDTH},
        projection_dim=16,
    )
    model = CLIPModel(config)
    move(model)
    config.architectures = ["CLIPModel"]
    config.save_pretrained(folder)
    weights = dict(model.state_dict())
    weights["text_model.embeddings.position_ids"] = torch.arange(8)[None]
    weights["vision_model.embeddings.position_ids"] = torch.arange(PATCHES + 1)[None]
    torch.save(weights, folder / "pytorch_model.bin")
    processor = {"crop_size": SIDE, "do_center_crop": True, "do_normalize": True, "do_resize": True, "size": SIDE}
    write_json(
        folder / "preprocessor_config.json",
        processor | OPENAI | {"feature_extractor_type": "CLIPFeatureExtractor", "resample": 3},
    )
    return Tower(model.vision_model, new_image_processor("clip", SIDE))


def published_dinov2(folder: Path) -> Tower:
    """facebook/dinov2-base, tiny: bare, its pictures smaller than the size it was made for."""
    model = Dinov2Model(Dinov2Config(**SIZES | {"image_size": 2 * SIDE}))
    move(model)
    model.save_pretrained(folder)
    processor = {"crop_size": {"height": SIDE, "width": SIDE}, "do_center_crop": True, "do_convert_rgb": True}
    processor |= {"do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 3, **IMAGENET}
    processor |= {"image_processor_type": "BitImageProcessor", "rescale_factor": 1 / 255}
    write_json(folder / "preprocessor_config.json", processor | {"size": {"shortest_edge": SIDE + 4}})
    return Tower(model, new_image_processor("dinov2", SIDE))


def published_resnet(folder: Path) -> Tower:
    """microsoft/resnet-50, tiny: under a classifier, an old processor file."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], num_labels=5)
    model = ResNetForImageClassification(config)
    move(model)
    model.save_pretrained(folder)
    processor: dict[str, Any] = {
        "crop_pct": 0.875,
        "do_normalize": True,
        "do_resize": True,
        "size": SIDE,
        "resample": 3,
    }
    processor |= {"feature_extractor_type": "ConvNextFeatureExtractor"}
    write_json(folder / "preprocessor_config.json", processor | IMAGENET)
    return Tower(model.resnet, new_image_processor("resnet", SIDE))


def published_vit(folder: Path) -> Tower:
    """google/vit-base-patch16-224, tiny: under a classifier."""
    model = ViTForImageClassification(ViTConfig(**SIZES, intermediate_size=2 * WIDTH, num_labels=5))
    move(model)
    model.save_pretrained(folder)
    processor: dict[str, Any] = {"do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 2}
    processor |= {"image_processor_type": "ViTImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    write_json(folder / "preprocessor_config.json", processor | {"size": {"height": SIDE, "width": SIDE}})
    return Tower(model.vit, new_image_processor("vit", SIDE))


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content))


PUBLISHED = {
    "siglip": (published_siglip, "vision_model.encoder.layers.0.self_attn.q_proj.weight"),
    "clip": (published_clip, "vision_model.pre_layrnorm.weight"),
    "dinov2": (published_dinov2, "encoder.layer.0.attention.attention.query.weight"),
    "resnet": (published_resnet, "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight"),
    "vit": (published_vit, "vit.encoder.layer.0.attention.attention.query.weight"),
}


@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_published_layouts_are_loaded(name: str, tmp_path: Path) -> None:
    """The published keys and processor files, with random weights: what is loaded is what was written."""
    write, key = PUBLISHED[name]
    torch.manual_seed(0)
    written = write(tmp_path).eval()
    assert key in keys_of(tmp_path)
    loaded = load_tower(tmp_path).eval()
    given = pixels(64, 64)
    assert_same(loaded(given), written(given))
    views = torch.randint(0, 256, (1, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded.normalise(views), written.normalise(views))  # the family's published numbers
    assert processed_size(loaded.image_processor) == (SIDE, SIDE)
    loaded.save(tmp_path / "again")
    assert_same(load_tower(tmp_path / "again").eval()(given), written(given))


def keys_of(folder: Path) -> set[str]:
    """The names of the weights in `folder`."""
    if (folder / "pytorch_model.bin").is_file():
        return set(torch.load(folder / "pytorch_model.bin", weights_only=True))
    return set(load_file(folder / "model.safetensors"))


def processed_size(processor: BaseImageProcessor) -> tuple[int, int]:
    """Pixels of what it makes of a picture of 90 x 70."""
    made = processor([torch.zeros(3, 70, 90, dtype=torch.uint8)], return_tensors="pt")["pixel_values"]
    return made.shape[-2], made.shape[-1]


@torch.no_grad()
def test_a_bare_clip_tower_of_transformers_4_is_loaded(tmp_path: Path) -> None:
    """Its keys have one level more."""
    tower = tiny_tower("clip")
    tower.save(tmp_path)
    weights = {f"vision_model.{key}": value for key, value in load_file(tmp_path / "model.safetensors").items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same(load_tower(tmp_path).eval()(pixels()), tower(pixels()))


def test_a_model_without_a_known_tower(tmp_path: Path) -> None:
    tiny_tower("vit").save(tmp_path)
    write_json(tmp_path / "config.json", {"model_type": "beit"})
    with pytest.raises(ModelError, match=r"holds a beit.*known are: clip_vision_model, .*dinov2.*resnet.*llava"):
        load_tower(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    tiny_tower("vit").save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ModelError, match=f"lacks {name}; export or copy it again"):
        load_tower(tmp_path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    tower = tiny_tower("vit")
    tower.save(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is damaged"):
        load_tower(tmp_path)
    tower.save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ModelError, match="weights are damaged"):
        load_tower(tmp_path)
    tower.save(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ModelError, match="image processor cannot be read"):
        load_tower(tmp_path)
    published_clip(tmp_path / "clip")
    (tmp_path / "clip" / "pytorch_model.bin").write_bytes(b"no pickle")
    with pytest.raises(ModelError, match="weights are damaged"):
        load_tower(tmp_path / "clip")


def test_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    tower = tiny_tower("vit")
    tower.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", config | {"intermediate_size": 8})
    with pytest.raises(ModelError, match=r"mismatched keys: .*mlp\.fc1"):
        load_tower(tmp_path)
    write_json(tmp_path / "config.json", config | {"num_hidden_layers": LAYERS + 1})
    with pytest.raises(ModelError, match=r"missing keys: .*layers\.2\."):
        load_tower(tmp_path)


def test_names_that_lead_nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no folder nowhere, and it is no hub name"):
        load_tower("nowhere")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ModelError, match="is a file"):
        load_tower(file)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="nobody/nothing-here is not on this machine and the hub cannot be reached"):
        load_tower("nobody/nothing-here")


# --- with a text half


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PreTrainedTokenizerFast]:
    yield make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_a_new_siglip_is_transformers_own(tokenizer: PreTrainedTokenizerFast) -> None:
    """The same numbers and the same seed give the same weights as the plain configuration, but for the positions."""
    torch.manual_seed(3)
    ours = new_pair(ViTShape("siglip", WIDTH, 2, 2, PATCH, SIDE), TextShape(WIDTH, 1, 2, 12, 2 * WIDTH), tokenizer)
    text = SiglipTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_size=WIDTH,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    vision = SiglipVisionConfig(**SIZES, intermediate_size=4 * WIDTH)
    torch.manual_seed(3)
    theirs = SiglipModel(SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    other = {key for key, value in ours.state_dict().items() if not torch.equal(value, theirs.state_dict()[key])}
    assert other == {"vision_model.embeddings.position_embedding.weight"}


@torch.no_grad()
def test_a_new_clip_pools_at_the_end_of_the_text(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """As transformers loads it from a folder, with no code of ours; for short texts, full ones and cut ones."""
    torch.manual_seed(0)
    words = clip_tokenizer(tokenizer, 12)
    shape, text = ViTShape("clip", WIDTH, 2, 2, PATCH, SIDE), TextShape(24, 2, 2, 12, 48)
    new_pair(shape, text, words).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    model, words = AutoModel.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(model, CLIPModel)
    ids = words(
        ["a red circle", "a", "two green squares and a blue triangle on a wide yellow field of view and more of it"],
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    )["input_ids"]
    assert ids.shape == (3, 12)
    ends = (ids == words.eos_token_id).nonzero()
    assert ends[:, 0].tolist() == [0, 1, 2]  # each text has exactly one end
    assert ends[2, 1] == 11 and ends[1, 1] < ends[0, 1]
    output = model.text_model(ids)
    expected = torch.stack([output.last_hidden_state[row, end] for row, end in ends])
    assert torch.equal(output.pooler_output, expected)
    assert model.get_text_features(ids).pooler_output.shape == (3, 24)
    image = model.get_image_features(pixels()).pooler_output
    assert image.shape == (2, 24)
    padded = ids.clone()
    padded[0, ends[0, 1] + 1 :] = 9  # what stands behind the end is not read
    torch.testing.assert_close(model.text_model(padded).pooler_output[0], expected[0])
    # A word that is added leaves all other ids as they were.
    assert words("a red circle")["input_ids"][:-1] == tokenizer("a red circle")["input_ids"]


def test_a_text_half_that_would_not_find_the_end_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    shape, text = ViTShape("clip", WIDTH, 2, 2, PATCH, SIDE), TextShape(WIDTH, 1, 2, 12, WIDTH)
    assert tokenizer.eos_token_id == 2  # transformers takes that for a sign of an old CLIP
    with pytest.raises(ValueError, match="prepare it with clip_tokenizer"):
        new_pair(shape, text, tokenizer)
    with pytest.raises(ValueError, match="a clip or a siglip, not a vit"):
        new_pair(ViTShape("vit", WIDTH, 2, 2, PATCH, SIDE), text, tokenizer)
