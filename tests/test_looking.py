"""Attention maps are transformers' own weights, sum to one and have the grid of every family; colours are principal."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, SiglipVisionConfig, SiglipVisionModel

from assistant.towers import ResNetShape, Tower, ViTShape, new_image_processor, new_tower
from training.evaluation.looking import attention_maps, patch_colours

HEADS, REGISTERS = 2, 3
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": HEADS, "patch_size": 8, "image_size": 32}
FAMILIES = ("clip", "siglip", "siglip without a head", "dinov2", "dinov2 with registers", "vit")
VIEW_SIZES = ((32, 32), (48, 32), (32, 64), (64, 64))


def tiny_tower(family: str) -> Tower:
    """Three layers, 2 heads, patches of 8, random weights."""
    torch.manual_seed(0)
    if family == "dinov2 with registers":
        config = Dinov2WithRegistersConfig(**SIZES, num_register_tokens=REGISTERS)
        return Tower(Dinov2WithRegistersModel(config), new_image_processor("dinov2", 32)).eval()
    if family == "siglip without a head":
        headless = SiglipVisionModel(SiglipVisionConfig(**SIZES, intermediate_size=64, vision_use_head=False))
        return Tower(headless, new_image_processor("siglip", 32)).eval()
    return new_tower(ViTShape(family, 32, 3, HEADS, 8, 32)).eval()  # type: ignore[arg-type]


def last_attention(tower: Tower, pixels: torch.Tensor) -> torch.Tensor:
    """(B, heads, T, T): what transformers itself gives as the attention of the last layer."""
    tower.model.set_attn_implementation("eager")
    asked = {} if "dinov2" in tower.model.config.model_type else {"interpolate_pos_encoding": True}
    with torch.inference_mode():
        return tower.model(pixels, output_attentions=True, **asked).attentions[-1]


def views(height: int = 32, width: int = 32) -> torch.Tensor:
    """Two pictures of noise."""
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("height", "width"), VIEW_SIZES)
def test_maps_sum_to_one_on_the_right_grid(family: str, height: int, width: int) -> None:
    """One map for each head, also of a picture that is not square or larger; the tower is left as it was."""
    tower = tiny_tower(family)
    before = tower.model.config._attn_implementation
    maps = attention_maps(tower, views(height, width))
    assert maps.shape == (2, HEADS, height // 8, width // 8)
    torch.testing.assert_close(maps.sum((-1, -2)), torch.ones(2, HEADS), rtol=1e-5, atol=1e-6)
    assert float(maps.min()) >= 0
    assert not torch.allclose(maps[0], maps[1])
    assert tower.model.config._attn_implementation == before


@pytest.mark.parametrize("family", ["clip", "dinov2", "dinov2 with registers", "vit"])
@pytest.mark.parametrize(("height", "width"), VIEW_SIZES)
def test_a_class_tokens_map_is_transformers_attention(family: str, height: int, width: int) -> None:
    """The last layer's weights, from the class token to the patches; those to itself and to registers left out."""
    tower = tiny_tower(family)
    maps = attention_maps(tower, views(height, width))
    weights = last_attention(tower, tower.normalise(views(height, width)))
    leading = 1 + REGISTERS * (family == "dinov2 with registers")
    patches = height // 8 * (width // 8)
    assert weights.shape[-1] == leading + patches
    for picture in range(2):
        for head in range(HEADS):
            looked = weights[picture, head, 0, leading:]
            expected = (looked / looked.sum()).reshape(height // 8, width // 8)
            torch.testing.assert_close(maps[picture, head], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), VIEW_SIZES)
def test_where_the_mean_pools_the_map_is_the_mean_of_transformers_attention(height: int, width: int) -> None:
    """A SigLIP without its head: over all patches that look."""
    tower = tiny_tower("siglip without a head")
    maps = attention_maps(tower, views(height, width))
    weights = last_attention(tower, tower.normalise(views(height, width)))
    expected = weights.mean(2).unflatten(-1, (height // 8, width // 8))
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), VIEW_SIZES)
def test_siglips_map_is_its_heads_attention(height: int, width: int) -> None:
    """By the plain formula: a softmax over the probe's query and the patches' keys."""
    tower = tiny_tower("siglip")
    maps = attention_maps(tower, views(height, width))
    attention = tower.model.head.attention
    with torch.inference_mode():
        pixels = tower.normalise(views(height, width))
        patches = tower.model(pixels, interpolate_pos_encoding=True).last_hidden_state
        query_weight, key_weight, _ = attention.in_proj_weight.chunk(3)
        query_bias, key_bias, _ = attention.in_proj_bias.chunk(3)
        query = (tower.model.head.probe[0, 0] @ query_weight.T + query_bias).unflatten(-1, (HEADS, -1))
        keys = (patches @ key_weight.T + key_bias).unflatten(-1, (HEADS, -1))
        scores = torch.einsum("hd,bnhd->bhn", query, keys) / query.shape[-1] ** 0.5
    torch.testing.assert_close(maps.flatten(2), scores.softmax(-1), rtol=1e-4, atol=1e-6)


def test_a_resnet_has_no_attention() -> None:
    """And says what to look at instead."""
    with pytest.raises(ValueError, match="no attention to look at"):
        attention_maps(new_tower(ResNetShape(18, 64)), views(64, 64))


def test_colours_are_principal_components() -> None:
    """Against scikit-learn, but for the sign; within 0 and 1; one set of components for all pictures."""
    patches = torch.randn(2, 5, 6, 16, generator=torch.Generator().manual_seed(2)) * torch.linspace(3, 0.1, 16)
    colours = patch_colours(patches)
    assert colours.shape == (2, 5, 6, 3)
    assert float(colours.min()) >= 0 and float(colours.max()) <= 1
    expected = PCA(3).fit_transform(patches.flatten(0, 2).numpy())
    for channel in range(3):
        likeness = np.corrcoef(colours[..., channel].flatten().numpy(), expected[:, channel])[0, 1]
        assert abs(likeness) > 0.99
    with pytest.raises(ValueError, match="no three principal components"):
        patch_colours(patches[0, 0, :3])
