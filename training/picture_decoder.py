"""MAE's light decoder, and pictures as rows of patches: from some encoded patches to the pixels of the others."""

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import ViTMAEConfig
from transformers import initialization as init
from transformers.models.vit_mae.modeling_vit_mae import (
    ViTMAELayer,
    ViTMAEPreTrainedModel,
    build_2d_sinusoidal_position_embedding,
)

NORM_EPSILON = 1e-6  # the paper's code; transformers' ViTMAE reads it from its configuration


def patchify(pixels: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, N, C * patch * patch): each patch a row, row by row of the picture, channels outermost."""
    return functional.pixel_unshuffle(pixels, patch).flatten(2).transpose(1, 2)


def unpatchify(patches: Tensor, patch: int, rows: int, columns: int) -> Tensor:
    """(B, rows * columns, C * patch * patch) -> (B, C, H, W), the inverse of `patchify`."""
    return functional.pixel_shuffle(patches.transpose(1, 2).unflatten(2, (rows, columns)), patch)


def others(chosen: Tensor, count: int) -> Tensor:
    """Of the numbers 0 to `count` - 1, those that are not in `chosen` (B, n), rising: (B, count - n) int64."""
    free = torch.ones(len(chosen), count, dtype=torch.uint8, device=chosen.device).scatter_(1, chosen, 0)
    return free.argsort(dim=1, descending=True, stable=True)[:, : count - chosen.shape[1]]


def take(rows: Tensor, chosen: Tensor) -> Tensor:
    """(B, N, D) -> (B, n, D): the rows that `chosen` (B, n) names, in its order."""
    return rows.gather(1, chosen[..., None].expand(-1, -1, rows.shape[-1]))


@lru_cache(maxsize=16)
def fixed_positions(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """(rows * columns, width) sines and cosines of column, then of row, in the order of MAE's published weights."""
    positions = build_2d_sinusoidal_position_embedding(rows, columns, width, device=device)
    return positions.roll(width // 2, dims=-1)


class PictureDecoder(ViTMAEPreTrainedModel):
    """Predicts the pixels of patches that the encoder never saw (He et al. 2022, section 3, "MAE decoder").

    Encoded patches, and a learned token in the place of each other patch, get fixed positions and pass through layers
    of transformers' own ViTMAE. Unlike its decoder this one serves any grid, and predicts only what is asked for.
    """

    def __init__(self, encoder_width: int, patch_values: int, width: int, layers: int, heads: int) -> None:
        """A new decoder of `layers` layers of `width` channels for patches of `patch_values` numbers.

        Raises ValueError when the positions (4 parts) or the heads do not divide the width.
        """
        if width % 4 or width % heads:
            raise ValueError(
                f"a decoder of width {width} with {heads} heads: 4 and the number of heads have to divide the width"
            )
        super().__init__(
            ViTMAEConfig(
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                intermediate_size=4 * width,
                layer_norm_eps=NORM_EPSILON,
            )
        )
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.layers = nn.ModuleList([ViTMAELayer(self.config) for _ in range(layers)])
        self.norm = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.predict = nn.Linear(width, patch_values)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the paper's appendix A.1 has it: Xavier's uniform start for every linear layer."""
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
        elif isinstance(module, PictureDecoder):
            init.normal_(module.mask_token, std=self.config.initializer_range)

    def forward(
        self, encoded: Tensor, summary: Tensor, visible: Tensor, wanted: Tensor, grid: tuple[int, int]
    ) -> Tensor:
        """Predicted values (B, m, patch_values) of the patches `wanted` (B, m).

        Args:
            encoded: (B, n, D) the patches that the encoder saw.
            summary: (B, D) one vector of the whole picture; the paper's is the class token. It gets no position.
            visible: (B, n) their places, row by row in `grid`.
            wanted: (B, m) places to predict.
            grid: rows and columns of the whole picture.
        """
        embedded = self.embed(encoded)
        rows, columns = grid
        tokens = self.mask_token.to(embedded.dtype).expand(len(encoded), rows * columns, -1)
        tokens = tokens.scatter(1, visible[..., None].expand_as(embedded), embedded)
        hidden = tokens + fixed_positions(rows, columns, embedded.shape[-1], embedded.device)
        hidden = torch.cat([hidden, self.embed(summary)[:, None]], dim=1)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.predict(self.norm(take(hidden, wanted)))
