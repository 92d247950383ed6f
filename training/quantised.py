"""Load a model with its language model in 4 bits, for QLoRA."""

from pathlib import Path

import torch
from transformers import LlavaProcessor

from assistant.bitsandbytes_weights import four_bits
from assistant.checkpoint import load_llava
from assistant.projectors import Llava


def load_quantised(folder: Path, compute: torch.dtype = torch.float32) -> tuple[Llava, LlavaProcessor]:
    """The model of `folder` with the language model's matrices in NF4, see `four_bits`.

    It runs on a CPU as well, only slower.
    Raises ModelError where bitsandbytes is not installed, and as `load_llava` does.
    """
    model, processor = load_llava(folder, quantization_config=four_bits(compute))
    _keep_layout(model)
    return model, processor


def _keep_layout(model: Llava) -> None:
    """Let no evaluation repack the weights for a faster forward on the CPU: gradients through that layout are wrong.

    So it is in bitsandbytes 0.50 where the CPU has avx512_bf16; a test of ours compares gradients before and after.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
