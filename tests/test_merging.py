"""Merging changes no answer, or is refused: a tensor, a dtype, a template, the merge itself damaged on purpose."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import assistant.merging
from assistant.adapter_files import ADAPTER, load_adapted
from assistant.answering import Assistant, Request
from assistant.checkpoint import convert_weights
from assistant.hashing import weights_hash
from assistant.log_probabilities import TOLERANCE, apart
from assistant.merging import MergeError, merge
from assistant.models import ModelError
from tests.test_adapters import trained
from tests.tiny import make_tiny_llava
from training.check_questions import row_requests, scene_requests
from training.data.pictures import DataError
from ui.command_line import app


@dataclass(frozen=True)
class Taught:
    base: Path
    adapter: Path


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Taught:
    """A base, and an adapter that a few steps taught it."""
    folder = tmp_path_factory.mktemp("taught")
    base = make_tiny_llava(folder / "base")
    trained("lora", base, steps=4).export(folder / "tuned")
    return Taught(base, folder / "tuned" / ADAPTER)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return scene_requests(2)


def test_what_is_merged_answers_as_base_and_adapter_do(taught: Taught, requests: list[Request], tmp_path: Path) -> None:
    """By plain generation, with the words of both; and the report and the provenance say what was measured."""
    report = merge(taught.adapter, tmp_path / "merged", requests)
    together = Assistant(*load_adapted(taught.adapter)).answer_batch(requests)
    assert Assistant.load(tmp_path / "merged").answer_batch(requests) == together
    assert Assistant.load(taught.base).answer_batch(requests) != together  # or nothing was learned
    assert (report.prompts, report.stored, report.four_bits, report.unproven) == (2, "float32", None, None)
    assert 0 <= report.merging <= TOLERANCE["float32"] >= report.storing
    said = json.loads((tmp_path / "merged" / "provenance.json").read_text())
    assert said["parent"]["weights_sha256"] == weights_hash(taught.base)
    assert said["merge"]["merging"] == report.merging
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_base_in_bfloat16_gives_a_model_in_bfloat16(taught: Taught, requests: list[Request], tmp_path: Path) -> None:
    """Merging is exact; what is lost is the rounding to how the base is stored, and that is told apart."""
    base = tmp_path / "base"
    shutil.copytree(taught.base, base)
    convert_weights(base, "bfloat16")
    shutil.copytree(taught.adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "provenance.json").unlink()
    report = merge(tmp_path / "adapter", tmp_path / "merged", requests, base)
    assert report.stored == "bfloat16" and report.merging <= 1e-4 < report.storing <= TOLERANCE["bfloat16"]
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert report.unproven is not None and "does not say by hash" in report.unproven


def one_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["language_model.model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def a_dtype(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    key = "language_model.model.layers.1.input_layernorm.weight"  # ones, which float16 holds exactly
    weights[key] = weights[key].half()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def a_template(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|assistant|>", " <|assistant|>"))


def a_processor(folder: Path) -> None:
    file = folder / "processor_config.json"
    said = json.loads(file.read_text())
    said["image_processor"]["image_mean"] = [0.4, 0.5, 0.5]
    file.write_text(json.dumps(said))


def a_missing_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "one tensor": (one_tensor, r"model\.language_model\.layers\.1\.mlp\.up_proj\.weight on the disk is another"),
    "a dtype": (a_dtype, r"layers\.1\.input_layernorm\.weight is stored as torch\.float16, and the base as float32"),
    "a template": (a_template, r"what was written: prompt 1 is read otherwise than by the base"),
    "a processor": (a_processor, r"what was written: prompt 1 is read otherwise than by the base"),
    "no template": (a_missing_template, r"lacks chat_template\.jinja"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_merged_model_that_was_damaged_is_refused_and_nothing_is_left(
    what: str, taught: Taught, requests: list[Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, reason = DAMAGE[what]

    def convert_and_damage(folder: Path, dtype: Any) -> None:
        convert_weights(folder, dtype)
        damage(folder)

    monkeypatch.setattr(assistant.merging, "convert_weights", convert_and_damage)
    with pytest.raises(ModelError, match=reason):
        merge(taught.adapter, tmp_path / "merged", requests)
    assert list(tmp_path.iterdir()) == []


def test_a_merge_that_merges_nothing_is_refused(
    taught: Taught, requests: list[Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda adapted: adapted.unload(), raising=False)
    with pytest.raises(
        MergeError, match=r"merging: log-probabilities of prompt 1 lie .* apart, and 0\.0001 is allowed"
    ):
        merge(taught.adapter, tmp_path / "merged", requests)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_no_numbers_are_refused(taught: Taught, requests: list[Request], tmp_path: Path) -> None:
    shutil.copytree(taught.adapter, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    next(iter(weights.values()))[0, 0] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(MergeError, match="merging: log-probabilities of prompt 1 lie nan apart"):
        merge(tmp_path / "adapter", tmp_path / "merged", requests, taught.base)


def test_an_adapter_that_learned_on_four_bits_is_compared_with_the_whole_base(
    requests: list[Request], tmp_path: Path
) -> None:
    """Exactly with the full-precision base; how far the base in 4 bits lies from both is measured and told."""
    pytest.importorskip("bitsandbytes")
    base = make_tiny_llava(tmp_path / "base")
    trained("qlora", base, steps=2).export(tmp_path / "tuned")
    report = merge(tmp_path / "tuned" / ADAPTER, tmp_path / "merged", requests)
    assert report.merging <= 1e-4 and report.storing <= 1e-4
    assert report.four_bits is not None and report.four_bits > 0.01


def test_there_is_nothing_to_write_over(taught: Taught, requests: list[Request], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(ModelError, match="there is something already; name a new folder"):
        merge(taught.adapter, tmp_path / "full", requests)
    assert (tmp_path / "full" / "letter.txt").read_text() == "mine"
    with pytest.raises(ModelError, match=r"there is no folder .*nowhere that it could be in"):
        merge(taught.adapter, tmp_path / "nowhere" / "merged", requests)


def command(*words: str | Path) -> Result:
    """What `kangaroo` says and with which exit code it ends, in this process."""
    return CliRunner().invoke(app, list(map(str, words)))


def test_the_command_merges_and_says_what_it_compared(taught: Taught, tmp_path: Path) -> None:
    done = command("merge", taught.adapter, "--out", tmp_path / "merged", "--prompts", "1")
    assert done.exit_code == 0, done.output
    assert "merged, in float32" in done.output and f"kangaroo serve {tmp_path / 'merged'}" in done.output
    assert Assistant.load(tmp_path / "merged").answer_batch(scene_requests(1))


def test_the_command_refuses_in_one_line(taught: Taught, tmp_path: Path) -> None:
    """An adapter for another base, a base without template, a folder that is no adapter, one that is named as model."""
    other = make_tiny_llava(tmp_path / "other", seed=1)
    into = ("--out", tmp_path / "merged")
    said = {
        "its answers would be noise; name the base": ("merge", taught.adapter, *into, "--base", other),
        "holds no adapter: there is no adapter_config.json": ("merge", other, *into),
        "holds an adapter alone": ("export", taught.adapter, *into),
        "there is no file": ("merge", taught.adapter, *into, "--data", tmp_path / "none.json"),
    }
    for reason, words in said.items():
        done = command(*words)
        assert done.exit_code == 1 and reason in done.output, done.output
    (other / "chat_template.jinja").unlink()
    done = command("merge", taught.adapter, *into, "--base", other)
    assert done.exit_code == 1 and "lacks chat_template.jinja" in done.output
    assert not (tmp_path / "merged").exists()


def test_unlikely_tokens_do_not_count_and_what_is_no_number_does() -> None:
    one, other = torch.tensor([[-1.0, -20.0]]), torch.tensor([[-1.5, -30.0]])
    assert apart(one, other) == 0.5
    assert apart(one, torch.tensor([[-1.0, torch.nan]])) != apart(one, torch.tensor([[-1.0, torch.nan]]))


def test_rows_of_ones_own_data_are_asked(tmp_path: Path) -> None:
    scene = scene_requests(1)[0]
    scene.pictures[0].save(tmp_path / "a.png")
    (tmp_path / "rows.csv").write_text("image,question,answer\na.png,What is it?,A scene.\nb.png,And this?,Gone.\n")
    (asked,) = row_requests(str(tmp_path / "rows.csv"), 1)
    assert asked.question == "What is it?" and asked.pictures[0].tobytes() == scene.pictures[0].tobytes()
    with pytest.raises(DataError, match=r"rows\.csv, row 2.*there is no file"):
        row_requests(str(tmp_path / "rows.csv"), 2)
