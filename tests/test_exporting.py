"""Exports hold what they say, load as they are, and the comparison with vLLM's answers finds what it must."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from assistant.answering import Assistant, Request
from assistant.checkpoint import convert_weights, load_llava
from assistant.exporting import FORMATS, MEAN_TOLERANCE, export_model, largest_allowed
from assistant.log_probabilities import read
from assistant.whole_folders import written_aside
from serving.parity import Comparison, ParityError, Served, compare, fault_in, largest_of, mean_of
from tests.test_serving_parity import ask_transformers, question_about
from tests.tiny import make_tiny_llava
from training.check_questions import scene_requests
from ui.command_line import app


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def quantised(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in int8."""
    folder = tmp_path_factory.mktemp("quantised")
    export_model(model, "tiny", "int8", folder)
    return folder


@pytest.fixture(scope="module")
def request_() -> Request:
    return scene_requests(1)[0]


@pytest.mark.parametrize("form", ["float32", "bfloat16"])
def test_floats_are_the_models_own_rounded_once(form: str, model: Path, tmp_path: Path) -> None:
    export_model(model, "tiny", "float32" if form == "float32" else "bfloat16", tmp_path)
    dtype = getattr(torch, form)
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(value.to(dtype), after[key]) for key, value in before.items())
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == form
    said = json.loads((tmp_path / "provenance.json").read_text())
    assert said["parent"]["name"] == "tiny" and said["export"] == {"format": form}


def test_an_export_is_read_by_transformers_alone(model: Path, request_: Request, tmp_path: Path) -> None:
    """With no code of ours: the same greedy answer, and the same likelihoods."""
    export_model(model, "tiny", "float32", tmp_path)
    prompt = question_about(request_.question, request_.pictures)
    one, other = (
        ask_transformers(
            AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder), prompt
        )
        for folder in (model, tmp_path)
    )
    assert one == other


def test_a_reading_is_what_generation_gives_step_by_step(model: Path, request_: Request) -> None:
    """The outside witness of the one pass: transformers' own generation, with its own logits at each step."""
    prompt = question_about(request_.question, request_.pictures)
    expected = ask_transformers(
        AutoModelForImageTextToText.from_pretrained(model).eval(), AutoProcessor.from_pretrained(model), prompt
    )
    reading = read(Assistant.load(model), request_, expected.ids)
    start = len(expected.prompt_ids)
    assert reading.ids == [*expected.prompt_ids, *expected.ids]
    steps = reading.log_probabilities[start - 1 : -1]
    assert [step[token].item() for step, token in zip(steps, expected.ids, strict=True)] == pytest.approx(
        expected.logprobs, abs=1e-4
    )


def served_by(model: Assistant, request: Request, tokens: int = 6) -> Served:
    """What an engine without a fault would say: greedy tokens and the five likeliest at each."""
    ids: list[int] = []
    likeliest: list[dict[int, float]] = []
    for _ in range(tokens):
        last = read(model, request, ids).log_probabilities[-1]
        top = last.topk(5)
        ids.append(int(top.indices[0]))
        likeliest.append(dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
    prompt = read(model, request).ids
    return Served(prompt, ids, likeliest)


def test_a_comparison_finds_every_difference(model: Path, request_: Request) -> None:
    """Made by hand: a log-probability that is off, another token, another prompt, a number that is none."""
    original = Assistant.load(model)
    served = served_by(original, request_)
    same = compare(original, request_, served)
    assert (same.tokens, same.same) == (6, 6) and same.furthest < 1e-4 and same.mean < 1e-4
    off = [dict(step) for step in served.likeliest]
    off[2][served.ids[2]] -= 0.5
    found = compare(original, request_, Served(served.prompt_ids, served.ids, off))
    assert found.furthest == pytest.approx(0.5, abs=1e-3) and found.mean == pytest.approx(0.5 / 6, abs=1e-3)
    other = [*served.ids[:5], list(served.likeliest[5])[1]]
    parted = compare(original, request_, Served(served.prompt_ids, other, served.likeliest))
    assert parted.same == 5 and parted.furthest < 1e-4  # it says truly how likely its token was
    off[2][served.ids[2]] = math.nan
    assert math.isnan(compare(original, request_, Served(served.prompt_ids, served.ids, off)).furthest)
    with pytest.raises(ParityError, match="template, tokenizer or image processor differ"):
        compare(original, request_, Served(served.prompt_ids[1:], served.ids, served.likeliest))


def test_what_is_beyond_the_tolerance_is_a_fault_and_so_is_what_is_no_number(request_: Request) -> None:
    good, bad = Comparison(request_, 10, 10, 1e-5, 1e-6), Comparison(request_, 30, 30, 0.2, 0.01)
    assert fault_in([good, good], 1e-4, None) is None
    assert fault_in([good, bad], 1e-4, None) == "log-probabilities lie 0.2 apart, and 0.0001 is allowed"
    assert largest_of([good, bad]) == pytest.approx(0.2) and mean_of([good, bad]) == pytest.approx(0.0075, abs=1e-5)
    assert fault_in([good, bad], None, 0.1) is None
    assert "in the mean" in str(fault_in([good, bad], None, 0.001))
    none = Comparison(request_, 10, 10, math.nan, math.nan)
    assert fault_in([good, none], 1e-4, None) and fault_in([good, none], None, 0.1)
    assert all((largest_allowed(form) is None) == (form in MEAN_TOLERANCE) for form in FORMATS)


@pytest.mark.parametrize(
    ("command", "done"),
    [
        ("tune {model} --data {rows} --no-rehearsal", "taught"),
        ("tune {model} --data {rows} --qlora --no-rehearsal", "taught"),
        ("prefer {model} --no-rehearsal", "taught"),
        ("reinforce {model} --no-rehearsal", "taught"),
        ("join {model} --tiles 1x2", "changed"),
        ("merge {adapter} --base {model}", "merged into"),
        ("export {model} --format int8", "exported"),
    ],
)
def test_a_quantised_model_is_served_and_nothing_else(command: str, done: str, quantised: Path, tmp_path: Path) -> None:
    """Each command says in one line what to take in its place, and leaves nothing."""
    scene_requests(1)[0].pictures[0].save(tmp_path / "a.png")
    (tmp_path / "rows.csv").write_text("image,question,answer\na.png,What is it?,red\n")
    LoraConfig(r=2, target_modules=["q_proj"], base_model_name_or_path="tiny").save_pretrained(
        str(tmp_path / "adapter")
    )
    named = {"model": quantised, "rows": tmp_path / "rows.csv", "adapter": tmp_path / "adapter"}
    words = [word.format(**named) for word in command.split()]
    said = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "new")])
    assert said.exit_code == 1, said.output
    assert f"is quantised already and cannot be {done}; take the model that it was made of (tiny)" in said.stderr
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_written_aside_is_whole_or_not_there(tmp_path: Path) -> None:
    with written_aside(tmp_path / "new") as aside:
        (aside / "a").write_text("a")
        assert not (tmp_path / "new").exists()
    assert (tmp_path / "new" / "a").read_text() == "a"
    (tmp_path / "empty").mkdir()
    with written_aside(tmp_path / "empty") as aside:
        (aside / "b").write_text("b")
    with pytest.raises(KeyboardInterrupt), written_aside(tmp_path / "never") as aside:
        (aside / "c").write_text("c")
        raise KeyboardInterrupt
    (tmp_path / ".late.partial").mkdir()
    (tmp_path / ".late.partial" / "old").write_text("of a run that was killed")
    with written_aside(tmp_path / "late"):
        pass
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "empty",
        "empty/b",
        "late",
        "new",
        "new/a",
    ]


def test_a_model_in_bfloat16_is_widened(model: Path, tmp_path: Path) -> None:
    export_model(model, "tiny", "bfloat16", tmp_path / "half")
    export_model(tmp_path / "half", "half", "float32", tmp_path / "whole")
    narrow, wide = (load_llava(tmp_path / name)[0].state_dict() for name in ("half", "whole"))
    assert all(torch.equal(value, wide[name]) for name, value in narrow.items())
    convert_weights(tmp_path / "whole", "bfloat16")
    assert (
        load_file(tmp_path / "whole" / "model.safetensors").keys()
        == load_file(tmp_path / "half" / "model.safetensors").keys()
    )
