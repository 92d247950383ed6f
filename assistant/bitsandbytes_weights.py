"""Hold a language model's matrices in 4 or 8 bits with bitsandbytes, by names that transformers and vLLM both read."""

import importlib.util

import torch
from transformers import BitsAndBytesConfig

from assistant.models import ModelError

# Whoever reads pictures and writes words stays as it is: they are small, and the projector may train. transformers
# looks for these at the start of a module's path, where `model.` comes first; vLLM's loader (vllm-bnb-plugin) looks for
# whole parts of its own path, where it does not, and would quantise the tower if it found `model.vision_tower` alone.
KEPT = ["vision_tower", "multi_modal_projector", "lm_head", "model.vision_tower", "model.multi_modal_projector"]


def four_bits(compute: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantisation (Dettmers et al. 2023); matrices are widened to `compute` for each product.

    Raises ModelError where bitsandbytes is not installed.
    """
    _require_bitsandbytes()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=KEPT,
    )


def eight_bits() -> BitsAndBytesConfig:
    """LLM.int8 (Dettmers et al. 2022): integers with a scale for each row; channels of large inputs stay as they are.

    Raises ModelError where bitsandbytes is not installed.
    """
    _require_bitsandbytes()
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=KEPT)


def _require_bitsandbytes() -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "weights in 4 or 8 bits need bitsandbytes, which is not installed: `pip install bitsandbytes`; LoRA and "
            "other formats do without"
        )
