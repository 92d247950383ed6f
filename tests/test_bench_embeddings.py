"""The benchmark of embedding and search in its tiny form: it runs, and sides that differ are not compared."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from typer.testing import CliRunner

from assistant.embeddings import Embedder
from scripts.bench_embeddings import app
from scripts.benchmarks import embedding, searching
from scripts.benchmarks.measuring import Disagreement, Pair

FIGURES = {"bare": "bare tower", "transformers": "transformers", "open_clip": "open_clip"}


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    """The tiny CLIP."""
    return embedding.new_embedder(embedding.SHAPES["tiny"], tmp_path_factory.mktemp("tower"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four small photographs."""
    return embedding.photographs(tmp_path_factory.mktemp("pictures") / "below", 4, 320, 240)


@pytest.mark.parametrize("peer", FIGURES)
def test_both_sides_embed_alike(peer: str, embedder: Embedder, files: list[Path]) -> None:
    """And open_clip's own model does its side."""
    embedding.check(embedding.PAIRS[peer], embedder, files)
    pair = embedding.PAIRS[peer](embedder, files)
    assert pair.peer == FIGURES[peer]
    called = set()

    def note(module: nn.Module, inputs: object, output: object) -> None:
        called.add(type(module).__module__.partition(".")[0])

    hook = register_module_forward_hook(note)
    try:
        assert pair.theirs().shape == (4, embedding.TEXT.width)
    finally:
        hook.remove()
    assert ("open_clip" in called) == (peer == "open_clip")


def test_sides_that_differ_are_not_compared(embedder: Embedder, files: list[Path]) -> None:
    """Pictures in another order, or a vector that is missing."""

    def shuffled(embedder: Embedder, files: list[Path]) -> Pair:
        work = embedding.ours(embedder, files)
        return Pair("embed", "peer", work, lambda: work().flip(0), embedding.ALIKE, "")

    def short(embedder: Embedder, files: list[Path]) -> Pair:
        work = embedding.ours(embedder, files)
        return Pair("embed", "peer", work, lambda: work()[1:], embedding.ALIKE, "")

    for build, said in ((shuffled, "one picture differs by"), (short, "ours is")):
        with pytest.raises(Disagreement, match=said):
            embedding.check(build, embedder, files)  # type: ignore[arg-type]


def test_photographs_are_different_and_of_that_size(tmp_path: Path) -> None:
    """More than there are distinct ones are copies under other names."""
    files = embedding.photographs(tmp_path / "many", embedding.DISTINCT + 2, 64, 48)
    assert len(set(files)) == embedding.DISTINCT + 2 == len(list((tmp_path / "many").iterdir()))
    assert len({file.read_bytes() for file in files}) == embedding.DISTINCT
    assert files[-1].read_bytes() == files[1].read_bytes()


def test_an_unchanged_folder_is_checked(tmp_path: Path) -> None:
    """Its check notices when the index says otherwise."""
    unchanged = searching.UnchangedFolder(tmp_path / "small", 30, 8)
    unchanged.check()
    assert float(unchanged.refresh()) == float(unchanged.hash_all()) == 30
    (tmp_path / "small" / "000" / "000003.jpg").unlink()
    with pytest.raises(Disagreement, match="something changed"):
        unchanged.check()


def test_the_program_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    """All three parts; the share of the bare tower has its bound; a peer that is not installed is named."""
    out = tmp_path / "figures.json"
    small = [
        "--tower",
        "tiny",
        "--rounds",
        "2",
        "--threads",
        "1",
        "--width",
        "320",
        "--vectors",
        "500",
        "--files",
        "50",
    ]
    done = CliRunner().invoke(app, [*small, "--out", str(out)], env={"COLUMNS": "200"})
    torch.set_num_threads(2)
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text())
    peers = {result["peer"] for result in report["results"]}
    assert {"faiss flat", "hash all", *FIGURES.values()} <= peers
    assert "sentence-transformers" in peers or "sentence-transformers is not installed" in done.stderr
    assert "GFLOP a picture" in done.stdout
    for result in report["results"]:
        assert result["name"] in done.stdout
        assert min(result["ratios"]) <= result["ratio"] <= max(result["ratios"])
        assert (result["bound"] is None) == (result["peer"] != "bare tower")
    refused = CliRunner().invoke(app, ["--tower", "huge"], env={"COLUMNS": "200"})
    assert refused.exit_code == 2 and "huge is none of" in refused.output
