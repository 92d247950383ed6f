"""The benchmark of tuning in its tiny form: three trainers lose alike, and ones that do not are not compared."""

import json
from pathlib import Path
from threading import get_ident

import pytest
import torch
from typer.testing import CliRunner

from scripts.bench_tuning import agree, app
from scripts.benchmarks.contest import Contest
from scripts.benchmarks.measuring import Disagreement, compare
from scripts.benchmarks.tuning import head_and_loss


def test_three_trainers_lose_alike(tmp_path: Path) -> None:
    """In fp32, in every step of two epochs; the losses are not all the same, so the order counts."""
    out = tmp_path / "tuning.json"
    arguments = ["--tiny", "--no-bf16", "--batches", "3", "--only", "transformers", "--only", "trl", "--out", str(out)]
    result = CliRunner().invoke(app, [*arguments, "--threads", str(torch.get_num_threads())])
    assert result.exit_code == 0, result.output
    steps = json.loads(out.read_text())["steps"]
    assert set(steps["losses"]) == {"kangaroo", "transformers", "trl"}
    for name, losses in steps["losses"].items():
        assert len(losses) == len(steps["seconds"][name]) == 6
        assert losses == pytest.approx(steps["losses"]["kangaroo"], rel=1e-3)
    assert len(set(steps["losses"]["kangaroo"])) > 3


def test_trainers_that_differ_are_not_compared() -> None:
    with pytest.raises(Disagreement, match=r"step 2: our loss is 2.0, that of trl 2.1"):
        agree({"kangaroo": [3.0, 2.0], "transformers": [3.0, 2.0], "trl": [3.0, 2.1]}, 1e-2)


def test_a_contest_goes_round() -> None:
    """A step each in turn, the first in this thread; one with fewer steps drops out, a failure is raised at the end."""
    contest, done, threads = Contest(["a", "b", "c"]), [], {}

    def work(name: str, steps: int, fails: bool = False) -> None:
        threads[name] = get_ident()
        for _ in range(steps):
            done.append(name)
            contest.hand_on(name)
        if fails:
            raise ValueError(f"{name} fell")

    with pytest.raises(ValueError, match="c fell"):
        contest.run({"a": lambda: work("a", 3), "b": lambda: work("b", 2), "c": lambda: work("c", 1, fails=True)})
    assert done == ["a", "b", "c", "a", "b", "a"]
    assert threads["a"] == get_ident() and len(set(threads.values())) == 3


def test_head_and_loss_are_the_same_work() -> None:
    """And take less memory already at this size."""
    found = compare(head_and_loss(64, 16, 1000, 0.25, torch.device("cpu")), 1, torch.device("cpu"))
    assert found.our_loss == pytest.approx(found.their_loss, rel=1e-4)
    assert found.our_memory < found.their_memory / 2


def test_an_unknown_peer_is_refused() -> None:
    result = CliRunner().invoke(app, ["--only", "axolotl"])
    assert result.exit_code == 2 and "'axolotl' is not one of" in result.output
