"""A tower of each family goes from two steps of training through merging to vLLM, and exports are served as checked."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import assistant.exporting
from assistant.adapter_files import ADAPTER, load_adapted
from assistant.answering import Assistant, Request
from assistant.checkpoint import convert_weights, save_llava
from assistant.exporting import MEAN_TOLERANCE, Format, arithmetic_of, export_model, largest_allowed
from assistant.log_probabilities import TOLERANCE, Arithmetic
from assistant.merging import merge
from assistant.models import JOEY
from serving.engine import LocalEngine
from serving.parity import Comparison, ask_engine, compare, compare_served, fault_in, largest_of, mean_of
from tests.conftest import SECONDS_TO_START
from tests.test_adapters import trained
from tests.tiny import make_tiny_joined
from training.check_questions import scene_requests
from ui.command_line import app

pytestmark = pytest.mark.slow

TOKENS = 12
FAMILIES = ("siglip", "clip", "clip with its class token", "dinov2")


def make_base(family: str, folder: Path) -> Path:
    """A tiny LLaVA with a tower of `family`; the class token is seen by the language model where the name says so."""
    match family:
        case "siglip" | "dinov2":
            make_tiny_joined(family, folder)
        case "clip":
            make_tiny_joined("clip", folder)
        case _:
            model, processor = make_tiny_joined("clip", folder)
            model.config.vision_feature_select_strategy = processor.vision_feature_select_strategy = "full"
            model.config.image_seq_length = 101
            save_llava(model, processor, folder)
    return folder


def served_and_compared(merged: Path, original: Assistant, requests: Sequence[Request]) -> list[Comparison]:
    """What a vLLM on `merged` answers, against the model that was trained."""
    with LocalEngine(merged, "merged", dtype="float32") as engine:
        engine.wait_until_ready(SECONDS_TO_START)
        served = [ask_engine(engine, request, TOKENS) for request in requests]
    return [compare(original, request, answer) for request, answer in zip(requests, served, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_trained_is_what_vllm_serves_once_merged(family: str, tmp_path: Path) -> None:
    """Against base and adapter as training left them, not merged, in transformers: the same tokens, to the end."""
    base = make_base(family, tmp_path / "base")
    trained("lora with projector", base, steps=2).export(tmp_path / "tuned")
    adapter = tmp_path / "tuned" / ADAPTER
    requests = [*scene_requests(3), Request("What is there?")]
    merge(adapter, tmp_path / "merged", requests)
    original = Assistant(*load_adapted(adapter))
    assert original.answer_batch(requests) != Assistant.load(base).answer_batch(requests)
    compared = served_and_compared(tmp_path / "merged", original, requests)
    print(f"{family}: log-probabilities lie at most {largest_of(compared):.2g} apart")
    assert fault_in(compared, TOLERANCE["float32"], None) is None
    assert all(one.same == one.tokens > 0 for one in compared)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8"])
def test_an_export_of_joey_is_served_within_its_tolerance(form: Format, tmp_path: Path) -> None:
    export_model(JOEY, "Joey", form, tmp_path)
    compared = compare_served(tmp_path, JOEY, arithmetic_of(form), scene_requests(8), 24, SECONDS_TO_START)
    print(f"{form}: at most {largest_of(compared):.2g} apart, {mean_of(compared):.2g} in the mean")
    assert fault_in(compared, largest_allowed(form), MEAN_TOLERANCE.get(form)) is None


def test_a_damaged_export_is_found_by_what_it_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of one matrix, in a model that loads without complaint: exit code 1, and nothing is left."""

    def convert_and_damage(folder: Path, dtype: Arithmetic) -> None:
        convert_weights(folder, dtype)
        weights = load_file(folder / "model.safetensors")
        weights["multi_modal_projector.linear_2.weight"][0] *= 1.5
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    base = make_base("siglip", tmp_path / "base")
    monkeypatch.setattr(assistant.exporting, "convert_weights", convert_and_damage)
    words = ["export", base, "--out", tmp_path / "out", "--format", "float32", "--check", "--prompts", "2"]
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 1, done.output
    assert "vLLM does not answer as the original does" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_the_command_exports_checks_and_leaves_what_is_served(tmp_path: Path) -> None:
    """`kangaroo export --check` as people run it, and `kangaroo ask` on what it leaves."""
    kangaroo = Path(sys.executable).with_name("kangaroo")
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"}
    command: list[str | Path] = [
        kangaroo,
        "export",
        "--out",
        tmp_path / "small",
        "--format",
        "int8",
        "--check",
        "--prompts",
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "largest difference" in done.stdout and f"kangaroo serve {tmp_path / 'small'}" in done.stdout
    scene_requests(1)[0].pictures[0].save(tmp_path / "scene.png")
    asked: list[str | Path] = [kangaroo, "ask", tmp_path / "scene.png", "What is it?", "--model", tmp_path / "small"]
    answer = subprocess.run(asked, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert answer.returncode == 0 and answer.stdout.strip(), answer.stderr
