"""Position embeddings that a new tower starts from: sines and cosines of the row and the column of a patch."""

import torch
from torch import Tensor, nn

LONGEST_WAVE = 10_000
# Of the start. At 1 a new tower sees all pictures alike where its patches start small, as in all families but SigLIP;
# there they start at the size of pixels and drown a tenth (docs/decisions.md has what either brought).
AMPLITUDE, AMPLITUDE_OF_SIGLIP = 0.1, 1.0


def start_positions(embeddings: nn.Module, side: int, amplitude: float) -> None:
    """Write `sine_positions` into the embeddings of a CLIP, SigLIP, DINOv2 or ViT whose grid is `side` x `side`.

    They are trained on from there. Drawn at random and small, as transformers does, they are drowned by what patches
    show long before they are learned: our first towers could not tell left from right (docs/decisions.md).
    """
    table: Tensor = embeddings.get_parameter(
        "position_embeddings" if hasattr(embeddings, "position_embeddings") else "position_embedding.weight"
    )
    with torch.no_grad():
        # The patches come last: some families have a class token before them.
        table.view(-1, table.shape[-1])[-side * side :] = amplitude * sine_positions(side, table.shape[-1]).to(table)


def sine_positions(side: int, width: int) -> Tensor:
    """(side * side, width), row by row: the column's sines and cosines, then the row's, each in `width` / 4 waves.

    He et al. 2021 (MAE), appendix A.1, and Chen et al. 2021 (MoCo v3), section 5. Raises ValueError for a width that
    does not divide by four.
    """
    if width % 4:
        raise ValueError(f"a width of {width} does not divide by 4, which sines and cosines of two axes need")
    waves = LONGEST_WAVE ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * waves
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).float()
