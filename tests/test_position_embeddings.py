"""Where the patches of a new tower stand: against the formula in plain loops, in every family."""

import math
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from assistant.position_embeddings import sine_positions
from assistant.towers import TextShape, ViTShape, clip_tokenizer, new_pair, new_tower
from tests.tiny import make_tiny_tokenizer

SIDE, WIDTH = 3, 16
# How strong positions start: about as strong as the patches of the family do.
STARTS = {"clip": 0.1, "siglip": 1.0, "dinov2": 0.1, "vit": 0.1}


def by_hand(side: int, width: int) -> Tensor:
    """MAE's appendix, a number at a time."""
    table = torch.empty(side * side, width, dtype=torch.float64)
    quarter = width // 4
    for row in range(side):
        for column in range(side):
            for wave in range(quarter):
                rate = 1 / 10000 ** (wave / quarter)
                values = (math.sin(column * rate), math.cos(column * rate), math.sin(row * rate), math.cos(row * rate))
                for part, value in enumerate(values):
                    table[row * side + column, part * quarter + wave] = value
    return table.float()


def test_sines_and_cosines_of_both_axes() -> None:
    torch.testing.assert_close(sine_positions(SIDE, WIDTH), by_hand(SIDE, WIDTH))


def test_a_width_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="a width of 18 does not divide by 4"):
        sine_positions(SIDE, 18)


@pytest.mark.parametrize("family", ["clip", "siglip", "dinov2", "vit"])
def test_new_towers_start_from_them(family: Literal["clip", "siglip", "dinov2", "vit"]) -> None:
    """All patches, and not the class token; they are trained on from there."""
    tower = new_tower(ViTShape(family, WIDTH, 1, 2, 8, 8 * SIDE))
    name = "position_embedding.weight" if family in ("clip", "siglip") else "position_embeddings"
    table = tower.model.get_parameter(f"embeddings.{name}")
    assert table.requires_grad
    rows = table.detach().view(-1, WIDTH)
    torch.testing.assert_close(rows[-SIDE * SIDE :], STARTS[family] * by_hand(SIDE, WIDTH))
    assert len(rows) == SIDE * SIDE + (family != "siglip")
    assert all(float(row.abs().max()) < 0.5 for row in rows[: -SIDE * SIDE])


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_pairs_start_from_them(family: Literal["clip", "siglip"], tmp_path: Path) -> None:
    plain = make_tiny_tokenizer(tmp_path)
    tokenizer = clip_tokenizer(plain, 8) if family == "clip" else plain
    pair = new_pair(ViTShape(family, WIDTH, 1, 2, 8, 8 * SIDE), TextShape(WIDTH, 1, 2, 8, 32), tokenizer)
    table = pair.get_parameter("vision_model.embeddings.position_embedding.weight").detach()
    torch.testing.assert_close(table[-SIDE * SIDE :], STARTS[family] * by_hand(SIDE, WIDTH))
