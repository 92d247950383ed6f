"""Attention maps are transformers' own weights, sum to one and have the grid of every family; colours are principal."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from assistant.towers import ResNetShape, Tower, ViTShape, new_tower
from training.evaluation.looking import attention_maps, patch_colours

HEADS = 2


def tiny_tower(family: str) -> Tower:
    """Three layers, 2 heads, patches of 8, random weights."""
    torch.manual_seed(0)
    return new_tower(ViTShape(family, 32, 3, HEADS, 8, 32)).eval()  # type: ignore[arg-type]


def views(height: int = 32, width: int = 32) -> torch.Tensor:
    """Two pictures of noise."""
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ["clip", "siglip", "dinov2", "vit"])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 32)])
def test_maps_sum_to_one_on_the_right_grid(family: str, height: int, width: int) -> None:
    """One map for each head, also of a picture that is not square; the tower is left as it was."""
    tower = tiny_tower(family)
    before = tower.model.config._attn_implementation
    maps = attention_maps(tower, views(height, width))
    assert maps.shape == (2, HEADS, height // 8, width // 8)
    torch.testing.assert_close(maps.sum((-1, -2)), torch.ones(2, HEADS), rtol=1e-5, atol=1e-6)
    assert float(maps.min()) >= 0
    assert not torch.allclose(maps[0], maps[1])
    assert tower.model.config._attn_implementation == before


@pytest.mark.parametrize("family", ["clip", "dinov2", "vit"])
def test_a_class_tokens_map_is_transformers_attention(family: str) -> None:
    """The last layer's weights, from the class token to the patches."""
    tower = tiny_tower(family)
    maps = attention_maps(tower, views())
    tower.model.set_attn_implementation("eager")
    with torch.inference_mode():
        weights = tower.model(tower.normalise(views()), output_attentions=True).attentions[-1][:, :, 0, 1:]
    expected = (weights / weights.sum(-1, keepdim=True)).unflatten(-1, (4, 4))
    torch.testing.assert_close(maps, expected, rtol=1e-5, atol=1e-6)


def test_siglips_map_is_its_heads_attention() -> None:
    """By the plain formula: a softmax over the probe's query and the patches' keys."""
    tower = tiny_tower("siglip")
    maps = attention_maps(tower, views())
    attention = tower.model.head.attention
    with torch.inference_mode():
        patches = tower(tower.normalise(views())).patches
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
