"""What plan says of serving: weights as the file holds them, cache as vLLM counts it, bounds as loops find them."""

import re
from pathlib import Path

import pytest
from rich.console import Console
from safetensors import safe_open
from transformers import LlamaConfig, LlavaConfig
from typer.testing import CliRunner

from assistant.models import JOEY
from serving.engine import LocalEngine
from serving.engine_arguments import parse_engine_arguments
from training.config import RecipeError
from training.planning.serving import Gpu, Served, Split, report_serving, served, splits
from ui.command_line import app

H100 = Gpu(80e9, 3.35e12, 989e12)
BLOCK = 128  # tokens that vLLM keeps together on a CPU
LAYERS, WIDTH, INNER, WORDS = 32, 4096, 11008, 32064  # of LLaVA-1.5-7B's language model


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of llava-hf/llava-1.5-7b-hf, without weights."""
    folder = tmp_path_factory.mktemp("published") / "llava-1.5-7b-hf"
    text = LlamaConfig(vocab_size=WORDS, max_position_embeddings=4096)
    LlavaConfig(text_config=text.to_dict(), image_token_index=32000).save_pretrained(folder)
    return folder


def test_weights_are_those_that_the_file_holds() -> None:
    with safe_open(JOEY / "model.safetensors", framework="pt") as file:
        held = 0
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            count = 1
            for side in file.get_slice(name).get_shape():
                count *= side
            held += count
    assert served(str(JOEY)).weights == held


def test_a_published_model_is_counted_without_its_weights(published: Path) -> None:
    """Against the count on the model's own page, and loops over its layers."""
    found = served(str(published))
    assert found.weights == 7_063_427_072
    of_a_layer = 4 * WIDTH * WIDTH + 3 * WIDTH * INNER + 2 * WIDTH
    assert found.read_weights == LAYERS * of_a_layer + WIDTH + WORDS * WIDTH
    assert found.cache_bytes == sum(2 * WIDTH * 2 for _ in range(LAYERS)) == 524_288
    assert found.picture_tokens == 576


@pytest.mark.slow
def test_the_cache_holds_as_many_tokens_as_vllm_says(engine: LocalEngine, tiny_model: Path) -> None:
    """One GiB of cache, as tests' engines have it, in whole blocks."""
    said = re.findall(r"KV cache size: ([\d,]+) tokens", engine.log())
    assert int(said[-1].replace(",", "")) == 2**30 // (BLOCK * served(str(tiny_model)).cache_bytes) * BLOCK


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_bounds_are_those_of_plain_loops(published: Path, gpus: int) -> None:
    """A step reads every weight and every cached token once, or computes; whichever takes longer."""
    model, tokens = served(str(published)), 896
    split = Split(model, H100, gpus, tokens)
    left = 0.92 * 80e9 - 2 * model.weights / gpus
    requests = 0
    while left > 0 and requests < 1024:
        left -= tokens * model.cache_bytes / gpus
        requests += left > 0
    assert split.room == requests
    for answers in (1, 64, 1024):
        read = (2 * model.read_weights + answers * tokens * model.cache_bytes) / gpus / 3.35e12
        computed = 2 * model.read_weights * answers / gpus / 989e12
        assert split.tokens_a_second(answers) == pytest.approx(answers / max(read, computed))
    assert split.first_token_seconds() == pytest.approx(2 * model.read_weights * tokens / (gpus * 989e12))


def test_heads_of_few_are_held_twice() -> None:
    """Grouped-query attention with 8 heads of keys: on 16 GPUs each holds a whole one."""
    model = Served("grouped", 10**9, 10**9, 32, 64, 8, 128, 576)
    cached = [Split(model, H100, gpus, 1000).cache_bytes for gpus in (1, 4, 8, 16)]
    assert cached == [model.cache_bytes / gpus for gpus in (1, 4, 8, 8)]


def test_only_what_vllm_can_split_is_said(published: Path) -> None:
    """Joey has five heads, which nothing but one GPU divides; a model of 32 goes up to a machine's eight."""
    assert [split.gpus for split in splits(served(str(JOEY)), H100, 8, 8, 420)] == [1]
    assert [split.gpus for split in splits(served(str(published)), H100, 32, 8, 896)] == [1, 2, 4, 8]
    assert [split.gpus for split in splits(served(str(published)), H100, 6, 8, 896)] == [1, 2]


def test_the_report_names_flags_that_serve_takes(published: Path) -> None:
    console = Console(record=True, width=300)
    report_serving(str(published), 32, 8, "80GB", "3350GB/s", 989, None, console)
    said = console.export_text()
    assert "7.06 billion weights, 14.1 GB in bf16" in said and "524 kB of cache a token" in said
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("| ")]
    assert [row[:2] for row in rows[1:]] == [["1", "32"], ["2", "16"], ["4", "8"], ["8", "4"]]
    assert [parse_engine_arguments(row[-1]) for row in rows[1:]][2] == [
        *["--tensor-parallel-size", "4", "--data-parallel-size", "8"],
        *["--data-parallel-size-local", "2", "--data-parallel-address", "$FIRST"],
    ]


def test_what_does_not_fit_is_said(published: Path) -> None:
    asked = ["plan", "--serve", str(published), "--memory", "12GB", "--devices", "2"]
    done = CliRunner().invoke(app, asked, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    lines = [line for line in done.output.splitlines() if line.startswith("| ")]
    assert "does not fit" in lines[1] and "does not fit" not in lines[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--serve", "{folder}/nowhere"], "no configuration of a LLaVA-shaped model"),
        (["--serve", "{folder}", "--recipe", "dino"], "or a model with --serve"),
        (["--serve", "{folder}", "--bandwidth", "fast"], "--bandwidth 'fast' is no size"),
        (["--serve", "{folder}", "--devices", "12"], "does not divide into machines"),
    ],
)
def test_what_cannot_be_planned_is_refused(published: Path, words: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["plan", *(word.format(folder=published) for word in words)])
    assert done.exit_code == 1
    assert said in done.stderr


def test_a_model_of_words_alone_is_refused(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="LLaVA-shaped"):
        served(str(tmp_path))
