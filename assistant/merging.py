"""Merge an adapter into its base, and let nothing stand that answers otherwise than the two side by side."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlavaProcessor

from assistant.adapter_files import (
    PROVENANCE,
    base_of,
    load_adapted,
    unproven_base,
    was_held_in,
    why_only_merged,
)
from assistant.answering import Assistant, Request
from assistant.bitsandbytes_weights import four_bits
from assistant.checkpoint import convert_weights, keep_embedder, load_llava, save_llava
from assistant.exporting import require_unquantised
from assistant.hashing import file_hash, weights_hash
from assistant.log_probabilities import TOLERANCE, Arithmetic, Reading, apart, read
from assistant.models import ModelError, read_json
from assistant.projectors import Llava
from assistant.whole_folders import written_aside


class MergeError(ModelError):
    """A merged model that is not what base and adapter are together; nothing of it is left."""


@dataclass(frozen=True)
class MergeReport:
    """How far log-probabilities lie apart, at most, over all tokens of all prompts."""

    prompts: int
    stored: Arithmetic  # as the base is
    merging: float  # base and adapter side by side against both as one, in float32
    storing: float  # the same against what was read back from the disk, rounded as it is stored
    tolerance: float  # of `storing`; of `merging` it is float32's
    four_bits: float | None  # against the adapter on the base in 4 bits, where it was trained so
    only_merged: str | None  # why vLLM could not serve the adapter beside its base
    unproven: str | None  # what is not known of the base


def merge(adapter: Path, out: Path, requests: Sequence[Request], base: Path | None = None) -> MergeReport:
    """Write base and adapter as one model into the new folder `out`, and say how near its answers are to theirs.

    The comparison is with the full-precision base that the merged model is made of. Weights are stored as the base's.

    Args:
        adapter: a folder that peft wrote, ours or another's, see `read_adapter`.
        out: a new folder; it is there only when the model is whole and right.
        requests: real questions with pictures; at least one.
        base: the model the adapter stands on, see `base_of`.

    Raises:
        MergeError: the model answers otherwise, or is stored otherwise, than it should.
        ModelError: adapter or base cannot be read, or do not belong together.
    """
    folder = base_of(adapter, base)
    require_unquantised(folder, "merged into")
    adapted, processor = load_adapted(adapter, folder)
    stored = stored_arithmetic(folder)
    with written_aside(out) as aside:
        expected = readings(adapted.eval(), processor, requests)
        only_merged = why_only_merged(adapted)
        merged = adapted.merge_and_unload()
        merging = _furthest(expected, readings(merged, processor, requests), TOLERANCE["float32"], "merging")
        save_llava(merged, processor, aside)
        convert_weights(aside, stored)
        check_stored(aside, merged, stored)
        tolerance = TOLERANCE[stored]
        storing = _furthest(expected, readings(*load_llava(aside), requests), tolerance, "what was written")
        four = None
        if was_held_in(adapter) == "nf4":
            in_four = load_adapted(adapter, folder, quantization_config=four_bits(torch.float32))
            four = max(map(_apart, expected, readings(*in_four, requests)))
        report = MergeReport(
            len(requests), stored, merging, storing, tolerance, four, only_merged, unproven_base(adapter)
        )
        keep_embedder(folder, aside)
        _write_provenance(aside, adapter, folder, report)
    return report


def merge_table(report: MergeReport) -> Table:
    """The report as a table for the terminal."""
    table = Table("against base and adapter side by side", "largest difference", "allowed", title="Log-probabilities")
    table.add_row("merged, in float32", f"{report.merging:.2g}", f"{TOLERANCE['float32']:g}")
    table.add_row(f"as written, in {report.stored}", f"{report.storing:.2g}", f"{report.tolerance:g}")
    if report.four_bits is not None:
        table.add_row("adapter on the base in 4 bits, as in training", f"{report.four_bits:.2g}", "told only")
    return table


def stored_arithmetic(folder: Path) -> Arithmetic:
    """How the weights of the model in `folder` are stored. Raises ModelError where its config names another kind."""
    config = read_json(folder / "config.json")
    said = config.get("dtype", config.get("torch_dtype", "float32"))
    match said:
        case "float32" | "bfloat16" | "float16":
            return said
    raise ModelError(f"{folder}: its config.json says {said!r} weights; float32, bfloat16 and float16 can be merged")


def readings(model: Llava, processor: LlavaProcessor, requests: Sequence[Request]) -> list[Reading]:
    """What `model` reads and expects at every token of each of `requests`."""
    assistant = Assistant(model, processor)
    return [read(assistant, request) for request in requests]


def check_stored(folder: Path, merged: Llava, stored: Arithmetic) -> None:
    """Raises MergeError, naming the tensor, unless `folder` holds exactly the weights of `merged`, all as `stored`."""
    for key, value in load_file(folder / "model.safetensors").items():
        if value.dtype is not getattr(torch, stored):
            raise MergeError(f"{key} is stored as {value.dtype}, and the base as {stored}: nothing was kept")
    own = merged.state_dict()
    found = load_llava(folder)[0].state_dict()
    for name, value in own.items():
        if not torch.equal(_rounded(value, stored), found[name]):
            raise MergeError(f"{name} on the disk is another than was merged: nothing was kept")


def _rounded(value: Tensor, stored: Arithmetic) -> Tensor:
    return value.to(getattr(torch, stored)).float() if value.is_floating_point() else value


def _furthest(expected: Sequence[Reading], found: Sequence[Reading], tolerance: float, what: str) -> float:
    """The largest difference over all prompts. Raises MergeError where they read otherwise, or lie too far apart."""
    furthest = 0.0
    for number, (one, other) in enumerate(zip(expected, found, strict=True), start=1):
        if one.ids != other.ids or not _same(one.pixels, other.pixels):
            raise MergeError(
                f"{what}: prompt {number} is read otherwise than by the base (chat template, tokenizer or image "
                "processor differ): nothing was kept"
            )
        difference = _apart(one, other)
        if not difference <= tolerance:  # so that what is no number is refused too
            raise MergeError(
                f"{what}: log-probabilities of prompt {number} lie {difference:.3g} apart, and {tolerance:g} is "
                "allowed: nothing was kept"
            )
        furthest = max(furthest, difference)
    return furthest


def _apart(one: Reading, other: Reading) -> float:
    return apart(one.log_probabilities, other.log_probabilities)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


def _write_provenance(folder: Path, adapter: Path, base: Path, report: MergeReport) -> None:
    said = read_json(adapter / PROVENANCE) if (adapter / PROVENANCE).is_file() else {}
    named = said.get("base", {}).get("name") or base.name
    content = {
        "parent": {"name": named, "weights_sha256": weights_hash(base)},
        "adapter": {"name": adapter.name, "weights_sha256": file_hash(adapter / SAFETENSORS_WEIGHTS_NAME)},
        "versions": {package: version(package) for package in ("torch", "transformers", "peft")},
        "merge": asdict(report),
    }
    (folder / PROVENANCE).write_text(json.dumps(content, indent=2) + "\n")
