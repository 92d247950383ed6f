"""Store a language model's matrices as 8-bit integers in compressed-tensors' layout, which vLLM serves on a CPU too."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from assistant.models import ModelError, read_json
from assistant.weight_files import write_weights

MATRIX = re.compile(r"language_model\.(model\.)?layers\.\d+\..*_proj\.weight")
MOST = 127  # symmetric: -128 is left out
# As compressed-tensors 0.17 reads it: a scale for each row of a matrix, and one for each token of what enters it, taken
# as it comes. What reads pictures and what writes words stays as it is.
QUANTISATION: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
    "ignore": ["re:.*vision_tower.*", "re:.*multi_modal_projector.*", "re:.*lm_head"],
}


def store_as_integers(folder: Path) -> None:
    """Round the matrices of the language model in `folder` to integers from -127 to 127, and say so in its config.

    Raises ModelError where there is none.
    """
    file = folder / "model.safetensors"
    weights: dict[str, Tensor] = {}
    for key, value in load_file(file).items():
        if MATRIX.search(key):
            weights[key], weights[key.removesuffix("weight") + "weight_scale"] = rounded_to_integers(value)
        else:
            weights[key] = value
    if not any(value.dtype is torch.int8 for value in weights.values()):
        raise ModelError(f"{folder}: there is no matrix of a language model in it that could be stored as integers")
    write_weights(weights, file)
    config = read_json(folder / "config.json") | {"quantization_config": QUANTISATION}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def rounded_to_integers(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """int8 (N, K) and scales (N, 1) of `matrix` (N, K), whose product is near it; scales are of the matrix's own dtype.

    Each row's largest value becomes 127. The scale is rounded before it is used, so that every reader has the same.
    """
    scale = (matrix.float().abs().amax(1, keepdim=True) / MOST).clamp_min(1e-12).to(matrix.dtype)
    integers = (matrix.float() / scale.float()).round().clamp(-MOST, MOST)
    return integers.to(torch.int8), scale
