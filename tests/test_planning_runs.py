"""Finished runs are read as they were trained, those that do not belong together are refused, and plan tells all."""

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModel
from typer.testing import CliRunner

from scripts.benchmarks.measuring import arithmetic
from scripts.measure_costs import prepared, stage_of
from tests.test_planning_laws import HOFFMANN
from tests.test_pretraining import stage_of as tiny_stage
from training.data.pictures import DataError
from training.objective import total_loss
from training.planning.finished_stages import exported_parameters, read_runs
from training.planning.passes import passes_of, training_flops
from training.planning.runs_report import report_runs
from training.planning.subjects import Subjects
from training.recipe import run_stage
from training.stages import Workshop
from ui.command_line import app


def write_csv(
    file: Path, rows: Sequence[Sequence[object]], columns: Sequence[str] = ("parameters", "samples", "loss")
) -> Path:
    """A table of runs."""
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([columns, *rows])
    return file


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage of four real steps of eight, as `kangaroo train` leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    stage = tiny_stage("mae", schedule={"batch_size": 4, "accumulation": 2})
    run_stage(stage, Workshop(folder, None))
    return folder / "mae"


def copied(finished: Path, folder: Path, **changes: Any) -> Path:
    """The same finished stage elsewhere, with other settings or another loss said of it."""
    shutil.copytree(finished, folder)
    done = json.loads((folder / "done.json").read_text())
    done["scores"] |= {"eval_loss": changes.pop("loss")} if "loss" in changes else {}
    done["settings"] |= changes
    (folder / "done.json").write_text(json.dumps(done))
    return folder


def test_a_finished_stage_is_read_as_it_was_trained(finished: Path) -> None:
    runs = read_runs([finished])
    (run,) = runs.each
    assert run.name == "tiny/mae" and runs.unit == "samples"
    assert run.samples == 4 * 4 * 2
    tower = AutoModel.from_pretrained(finished / "output", add_pooling_layer=False)
    assert run.parameters == sum(weight.numel() for weight in tower.parameters())
    assert run.loss == json.loads((finished / "done.json").read_text())["scores"]["eval_loss"]
    assert run.flops is not None
    assert runs.flops_each() == pytest.approx(run.flops / run.parameters / run.samples)


def test_several_processes_count_with_their_samples(finished: Path, tmp_path: Path) -> None:
    """The log of a run of three processes says that three times as many samples came a step."""
    folder = copied(finished, tmp_path / "three")
    log = folder / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines:
        if "train_samples_per_second" in line:
            line["train_samples_per_second"] *= 3
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_runs([folder]).each[0].samples == 3 * 4 * 4 * 2


@pytest.mark.parametrize("name", ["clip", "siglip", "mae", "dinov2", "moco", "simclr"])
def test_flops_are_those_that_torch_counts(name: str) -> None:
    """Forward of real weights on real samples; heads and losses, which the formula leaves out, are some percent."""
    subject = prepared(stage_of(name), 2)
    objective = subject.objective
    with torch.no_grad():
        counted = arithmetic(lambda: total_loss(objective(**subject.batch)))
    assert 2 * sum(one.flops() for one in passes_of(objective)) == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"side": 64}, "side is 32 in the one and 64"),
        ({"mixture": [{"scenes": 65, "use": "pictures", "weight": 1}]}, "mixture.0.scenes is 64 in the one and 65"),
        ({"settings": {"masked": 0.5}}, "settings.decoder_heads|settings.decoder_layers"),
        ({"loss": float("nan")}, "nan is not a finite number"),
        ({"start_from": "other", "backbone": None}, "went on from other"),
    ],
    ids=["views", "data", "settings", "nan", "continued"],
)
def test_runs_that_do_not_belong_together_are_refused(
    changes: dict[str, Any], said: str, finished: Path, tmp_path: Path
) -> None:
    other = copied(finished, tmp_path / "other", **changes)
    with pytest.raises(DataError, match=said):
        read_runs([finished, other])


def test_what_may_differ_does_not_hinder(finished: Path, tmp_path: Path) -> None:
    """Another width, rate and name are what a law is about."""
    settings = json.loads((finished / "done.json").read_text())["settings"]
    wider = settings["backbone"] | {"width": 64}
    faster = settings["schedule"] | {"learning_rate": 3e-3}
    other = copied(finished, tmp_path / "other", backbone=wider, schedule=faster, name="wide")
    assert len(read_runs([finished, other]).each) == 2
    assert len(read_runs([finished.parent, other]).each) == 2


def test_a_contrastive_loss_belongs_to_its_batch(finished: Path, tmp_path: Path) -> None:
    folders = []
    for number, batch in enumerate((8, 16)):
        stage = tiny_stage("simclr", schedule={"batch_size": batch})
        folder = tmp_path / str(number)
        shutil.copytree(finished, folder)
        done = json.loads((finished / "done.json").read_text()) | {"settings": stage.model_dump(mode="json")}
        (folder / "done.json").write_text(json.dumps(done))
        folders.append(folder)
    with pytest.raises(DataError, match="samples of a step is 8 in the one and 16"):
        read_runs(folders)


@pytest.mark.parametrize(
    ("rows", "columns", "said"),
    [
        ([(1e6, 1e6, "")], ("parameters", "samples", "loss"), "line 2, loss: '' is no number"),
        ([(1e6, 1e6, 2), (1e6, "nan", 2)], ("parameters", "samples", "loss"), "line 3, samples: nan"),
        ([(1e6, 1e6, -2)], ("parameters", "samples", "loss"), "line 2, loss: -2"),
        ([(1e6, 2)], ("parameters", "loss"), "it needs parameters, samples or tokens"),
        ([(1e6, 2, 3, 4)], ("parameters", "samples", "tokens", "loss"), "it needs parameters, samples or tokens"),
        ([], ("parameters", "samples", "loss"), "no runs"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused_by_line(
    rows: list[tuple[object, ...]], columns: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=said):
        read_runs([write_csv(tmp_path / "runs.csv", rows, columns)])


def test_what_is_no_run_is_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(DataError, match="holds no finished stage"):
        read_runs([tmp_path])
    bare = copied(finished, tmp_path / "bare")
    (bare / "output" / "model.safetensors").unlink()
    with pytest.raises(DataError, match="no weights"):
        read_runs([bare])
    (bare / "output" / "model.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(DataError, match="is damaged"):
        exported_parameters(bare / "output")
    (bare / "log.jsonl").unlink()
    with pytest.raises(DataError, match="lacks the line that ends a run"):
        read_runs([bare])
    table = write_csv(tmp_path / "tokens.csv", [(1e6, 1e6, 2)], ("parameters", "tokens", "loss"))
    with pytest.raises(DataError, match="plan them apart"):
        read_runs([finished, table])


def table_of_runs(file: Path) -> Path:
    """Nine runs of a known law with a little noise."""
    generator = np.random.default_rng(0)
    rows = [
        (size, amount, float(HOFFMANN.loss(size, amount)) * np.exp(0.004 * generator.standard_normal()))
        for size in (1e6, 1e7, 1e8)
        for amount in (1e8, 1e9, 1e10)
    ]
    return write_csv(file, rows, ("parameters", "tokens", "loss"))


def test_the_report_says_how_far_and_how_sure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables, warnings, a picture and JSON, and all of them the same numbers."""
    monkeypatch.setattr("training.planning.forecast.RESAMPLES", 25)
    monkeypatch.setattr("training.planning.runs_report.RESAMPLES", 25)
    console = Console(record=True, width=110)
    asked = (1e9, 1e11)
    facts = report_runs([table_of_runs(tmp_path / "runs.csv")], tmp_path / "out", console, 1e22, asked)
    said = console.export_text()
    for words in ("Chinchilla", "Kaplan", "100 times the dearest in FLOPs", "would help most", "take it for a guess"):
        assert words in said
    assert json.loads((tmp_path / "out" / "plan.json").read_text()) == json.loads(json.dumps(facts))
    assert facts["asked"]["times_the_largest_run"]["flops"] == pytest.approx(100)
    assert [best["flops"] for best in facts["best"]] == pytest.approx([6e18, 1.8e19, 6e19, 1.8e20, 6e20, 1e22])
    assert facts["chosen"] == "Chinchilla"  # whose law it is
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name finished runs, or a recipe"),
        (["{runs}", "--recipe", "dino"], "name finished runs, or a recipe"),
        (["{runs}", "--parameters", "1e9"], "go together"),
        (["nowhere"], "no such file or folder"),
        (["{runs}", "--out", "{runs}"], "is a file: name a folder"),
        (["--recipe", "nothing"], "there is no recipe nothing"),
        (["--recipe", "scenes"], "scenes:tower, scenes:language"),
        (["--recipe", "scenes:tokenizer"], "no stage 'tokenizer' that trains a model"),
        (["--recipe", "dino", "--devices", "12"], "does not divide into machines of 8"),
        (["--recipe", "dino", "--batch", "100"], "does not divide among 8 devices"),
        (["--recipe", "dino", "--memory", "80"], "write it as 80GB"),
        (["--recipe", "dino", "--memory", "0GB"], "write it as 80GB"),
        (["--recipe", "dino", "--memory", "1MB"], "one sample of stage dino takes"),
    ],
)
def test_a_wrong_question_gets_one_line(words: list[str], said: str, tmp_path: Path) -> None:
    runs = table_of_runs(tmp_path / "runs.csv")
    done = CliRunner().invoke(
        app,
        [
            "plan",
            *(word.format(runs=runs) for word in words),
            *([] if "--out" in words else ["--out", str(tmp_path / "out")]),
        ],
    )
    assert done.exit_code == 1
    assert said in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_training_flops_count_what_goes_back() -> None:
    """A teacher costs its forward alone; 6 FLOPs a weight and token, and attention beside them."""
    objective = Subjects(Workshop(Path(), None)).objective(stage_of("dino"))
    large, small, teacher = passes_of(objective)
    total = training_flops([large, small, teacher])
    assert total == pytest.approx(3 * large.flops() + 3 * small.flops() + teacher.flops())
    weights = 4 * (4 * 96 * 96 + 2 * 96 * 384)
    embedding = 2 * 3 * 64 * 64 * 96
    assert large.flops() == pytest.approx(2 * (65 * (2 * weights + 4 * 4 * 65 * 96) + embedding))
