"""Write a model in another form for serving: other floats, or a language model in 4 or 8 bits."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args

import torch

from assistant.adapter_files import PROVENANCE
from assistant.bitsandbytes_weights import eight_bits, four_bits
from assistant.checkpoint import convert_weights, keep_embedder, load_llava, save_llava
from assistant.hashing import weights_hash
from assistant.integer_weights import store_as_integers
from assistant.log_probabilities import TOLERANCE, Arithmetic
from assistant.models import ModelError, read_json

Format = Literal["bfloat16", "float32", "int8", "bitsandbytes-4bit", "bitsandbytes-8bit"]
FORMATS: tuple[Format, ...] = get_args(Format)
# How far, in the mean over answered tokens, the log-probability may lie from the unquantised model's. On scenes and
# photographs Joey's exports lie 0.004 to 0.013, 0.002 to 0.007 and 0.009 to 0.021 apart; for a larger model there is
# three to five times as much room. Scales that are a row off lie 0.06 to 0.3 apart, swapped halves of bytes 6 to 9.
MEAN_TOLERANCE: dict[Format, float] = {"int8": 0.04, "bitsandbytes-8bit": 0.03, "bitsandbytes-4bit": 0.1}


def arithmetic_of(form: Format) -> Arithmetic:
    """What the exported model computes in."""
    return "float32" if form == "float32" else "bfloat16"


def largest_allowed(form: Format) -> float | None:
    """How far a single log-probability may lie from the original's; None where only the mean counts."""
    return None if form in MEAN_TOLERANCE else TOLERANCE[arithmetic_of(form)]


def export_model(source: Path, name: str, form: Format, target: Path) -> None:
    """Write the model of the complete folder `source`, called `name`, into the folder `target` as `form` says.

    - bfloat16, float32: all weights so.
    - int8: matrices of the language model as 8-bit integers, inputs rounded as they come (W8A8); on CPUs and GPUs.
    - bitsandbytes-4bit, -8bit: the same matrices in NF4, or as LLM.int8; vLLM reads them with `vllm-bnb-plugin`.

    Raises ModelError where `source` cannot be read or is quantised already.
    """
    require_unquantised(source, "exported")
    dtype = getattr(torch, arithmetic_of(form))
    if form.startswith("bitsandbytes"):
        bits = four_bits(dtype) if form == "bitsandbytes-4bit" else eight_bits()
        save_llava(*load_llava(source, dtype, quantization_config=bits), target)
    else:
        save_llava(*load_llava(source, dtype), target)
        convert_weights(target, arithmetic_of(form))
    if form == "int8":
        store_as_integers(target)
    keep_embedder(source, target)
    said = {
        "parent": {"name": name, "weights_sha256": weights_hash(source)},
        "export": {"format": form},
        "versions": {package: version(package) for package in ("torch", "transformers", "bitsandbytes")},
    }
    (target / PROVENANCE).write_text(json.dumps(said, indent=2) + "\n")


def require_unquantised(folder: Path, done: str) -> None:
    """Raises ModelError where the weights of `folder` are rounded to few bits; `done` is what cannot be done."""
    if "quantization_config" not in read_json(folder / "config.json"):
        return
    said = read_json(folder / PROVENANCE) if (folder / PROVENANCE).is_file() else {}
    parent = said.get("parent", {}).get("name")
    raise ModelError(
        f"{folder} is quantised already and cannot be {done}; take the model that it was made of"
        f"{f' ({parent})' if parent else ''}, and export what comes of it"
    )
