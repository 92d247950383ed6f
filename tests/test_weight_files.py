"""Weights may be read by whoever may read the files beside them."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from assistant.adapter_files import merge_adapter
from assistant.checkpoint import load_llava
from assistant.integer_weights import store_as_integers
from assistant.towers import ViTShape, new_tower
from assistant.weight_files import write_weights
from tests.tiny import make_tiny_llava
from training.adapters import LoraSettings, add_lora, export_adapted


@pytest.fixture(params=[0o022, 0o027])
def mode(request: pytest.FixtureRequest) -> Iterator[int]:
    """That of a new file under the mask of the test."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def modes(folder: Path) -> set[int]:
    """Those of all files in `folder`, among which there are weights."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert any(file.suffix == ".safetensors" for file in files)
    return {stat.S_IMODE(file.stat().st_mode) for file in files}


def test_weights_are_what_was_given_also_in_place_of_what_they_were_read_from(mode: int, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    wide = torch.arange(6.0).reshape(2, 3)
    write_weights({"wide": wide, "turned": wide.T}, file)
    write_weights({name: value * 2 for name, value in load_file(file).items()}, file)
    again = load_file(file)
    assert torch.equal(again["wide"], wide * 2) and torch.equal(again["turned"], wide.T * 2)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert modes(tmp_path) == {mode}


def test_whoever_may_read_a_model_may_read_its_weights(mode: int, tmp_path: Path) -> None:
    """A model, an adapter, what both give merged, its integers, and a tower."""
    base = make_tiny_llava(tmp_path / "base")
    model, _ = load_llava(base)
    adapter = add_lora(model, LoraSettings(rank=2, alpha=4), base, "base")
    export_adapted(model, adapter, set(), tmp_path / "taught")
    merge_adapter(tmp_path / "taught" / "adapter", tmp_path / "merged", base)
    store_as_integers(tmp_path / "merged")
    new_tower(ViTShape(family="dinov2", width=32, layers=1, heads=2, patch=16, image_side=32)).save(tmp_path / "tower")
    assert {folder.name for folder in tmp_path.iterdir()} == {"base", "taught", "merged", "tower"}
    for folder in tmp_path.iterdir():
        assert modes(folder) == {mode}, folder
