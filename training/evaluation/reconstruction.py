"""Open a tower with the decoder of its masked autoencoding, ours or transformers' ViTMAE, and let it draw pictures."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoImageProcessor, ViTMAEConfig, ViTMAEForPreTraining

from assistant.checkpoint import load_model
from assistant.models import ModelError, find_tower, read_json
from assistant.towers import Tower, load_tower, plain_vit
from training.objectives.mae import DECODER_FOLDER, DECODER_SETTINGS, DECODER_WEIGHTS, MaeObjective, Settings
from training.picture_decoder import fixed_positions, others, patchify, unpatchify

GREY = 128  # of patches that the tower does not see
FROM_VIT_MAE = ((r"^decoder_pred\.", "predict."), (r"^decoder_(embed|layers|norm)\.", r"\1."))


@dataclass(frozen=True)
class Reconstruction:
    """B pictures with most of their patches hidden, and what was drawn in their place; both (B, 3, H, W) uint8."""

    masked: Tensor
    drawn: Tensor


def load_masked_autoencoder(source: str | Path) -> MaeObjective | None:
    """The tower in `source`, a folder or a hub name, with its decoder; None where it has none.

    Raises ModelError where it cannot be found or is damaged.
    """
    folder = find_tower(source)
    if read_json(folder / "config.json").get("model_type") == ViTMAEConfig.model_type:
        return _from_vit_mae(folder)
    return _from_export(folder) if (folder / DECODER_FOLDER).is_dir() else None


@torch.inference_mode()
def reconstruct(model: MaeObjective, views: Tensor, seed: int) -> Reconstruction:
    """Hide the share of patches of `views` (B, 3, H, W) uint8 that `model` was trained with, and draw them again.

    `seed` decides which are hidden; each picture has its own.
    """
    patch, grid = model.tower.patch_size, model.tower.grid(views.shape[-2], views.shape[-1])
    count = grid[0] * grid[1]
    seen = min(count - 1, max(1, round(count * (1 - model.settings.masked))))
    chance = torch.rand(len(views), count, generator=torch.Generator().manual_seed(seed))
    visible = chance.argsort(1)[:, :seen].sort(1).values
    rows = patchify(views, patch)
    hidden = others(visible, count)[..., None].expand(-1, -1, rows.shape[-1])
    masked = unpatchify(rows.scatter(1, hidden, torch.full_like(rows, GREY)), patch, *grid)
    return Reconstruction(masked, model.reconstruct(views, visible))


def _from_export(folder: Path) -> MaeObjective:
    """What `MaeObjective.export` wrote."""
    beside = folder / DECODER_FOLDER
    tower = load_tower(folder)
    try:
        settings = Settings.model_validate_json((beside / DECODER_SETTINGS).read_text(encoding="utf-8"))
        model = MaeObjective(tower, tower.image_side, settings)
        model.decoder.load_state_dict(load_file(beside / DECODER_WEIGHTS))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"the decoder in {beside} cannot be read: {reason}; export or copy it again") from error
    return model.eval()


def _from_vit_mae(folder: Path) -> MaeObjective:
    """A ViTMAEForPreTraining's weights in a tower and a decoder of ours, which predict the same."""
    theirs = load_model(ViTMAEForPreTraining, folder)
    config = theirs.config
    if config.decoder_intermediate_size != 4 * config.decoder_hidden_size:
        raise ModelError(
            f"{folder}: decoder_intermediate_size is {config.decoder_intermediate_size}; only ViTMAEs whose decoder is "
            "4 times as wide within its layers, as all published ones, can be drawn with"
        )
    tower = Tower(plain_vit(theirs), AutoImageProcessor.from_pretrained(folder, local_files_only=True))
    settings = Settings(
        masked=config.mask_ratio,
        decoder_width=config.decoder_hidden_size,
        decoder_layers=config.decoder_num_hidden_layers,
        decoder_heads=config.decoder_num_attention_heads,
        normalise_target=config.norm_pix_loss,
    )
    model = MaeObjective(tower, tower.image_side, settings)
    decoder = theirs.decoder.state_dict()
    positions = decoder.pop("decoder_pos_embed")[0, 1:]
    rows = math.isqrt(len(positions))
    if not torch.allclose(positions, fixed_positions(rows, rows, positions.shape[1], positions.device), atol=1e-3):
        raise ModelError(f"{folder}: the decoder's positions are not the sines and cosines of all published ViTMAEs")
    model.decoder.load_state_dict(_decoder_weights(decoder, tower.patch_size))
    for norm in (module for module in model.decoder.modules() if isinstance(module, nn.LayerNorm)):
        norm.eps = config.layer_norm_eps
    return model.eval()


def _decoder_weights(theirs: Mapping[str, Tensor], patch: int) -> dict[str, Tensor]:
    """The weights of a ViTMAEDecoder, but for its positions, as PictureDecoder has them: channels outermost."""
    channels_outermost = torch.arange(3 * patch * patch).reshape(patch, patch, 3).permute(2, 0, 1).flatten()
    weights = {}
    for name, weight in theirs.items():
        if name.startswith("decoder_pred."):
            weight = weight[channels_outermost]
        for pattern, replacement in FROM_VIT_MAE:
            name = re.sub(pattern, replacement, name)
        weights[name] = weight
    return weights | {"mask_token": weights["mask_token"].flatten()}
