"""Load a model with its language model in 4 bits, for QLoRA."""

import importlib.util
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig, LlavaProcessor

from assistant.checkpoint import load_llava
from assistant.models import ModelError
from assistant.projectors import Llava

# Whoever reads pictures and writes words stays as it is: they are small, and the projector may train.
KEPT = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]


def load_quantised(folder: Path, compute: torch.dtype = torch.float32) -> tuple[Llava, LlavaProcessor]:
    """The model of `folder` with the language model's matrices in NF4 with double quantisation (Dettmers et al. 2023).

    They are widened to `compute` for each product. It runs on a CPU as well, only slower.
    Raises ModelError where bitsandbytes is not installed, and as `load_llava` does.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "QLoRA needs bitsandbytes, which is not installed: `pip install bitsandbytes`, or take LoRA instead"
        )
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=KEPT,
    )
    model, processor = load_llava(folder, quantization_config=four_bits)
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
