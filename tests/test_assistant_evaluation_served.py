"""The same task through a real vLLM and here in the process: the same answers, and the same likelihoods of choices."""

import json
from pathlib import Path

import pytest

from assistant.answering import Assistant
from serving.engine import LocalEngine
from training.data.scenes import EVALUATION_SEED, make_scene
from training.evaluation.endpoint import Endpoint, EndpointSettings
from training.evaluation.in_process import InProcess
from training.evaluation.task_items import TaskItems, open_task
from training.evaluation.task_run import answer_task, findings_of

# vLLM computes in bfloat16 here, as it serves; a log-likelihood is a sum over some ten tokens.
TOLERANCE = 0.6


@pytest.fixture(scope="module")
def endpoint(engine: LocalEngine) -> Endpoint:
    return Endpoint(EndpointSettings(f"{engine.base_url}/v1", key=str(engine.api_key), at_once=8))


def choices_task(folder: Path) -> TaskItems:
    rows = []
    for seed in range(6):
        scene = make_scene(EVALUATION_SEED + seed)
        scene.image.save(folder / f"{seed}.png")
        choices = ["a red circle", "green", "two blue squares on the left"]
        rows.append({"image": f"{seed}.png", "question": "What is it?", "answer": "green", "choices": choices})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.yaml").write_text("about: x\nkind: choices\ndata: {file: rows.jsonl}\n")
    return open_task(str(folder / "own.yaml"), None)


def test_choices_are_as_likely_as_in_the_process(endpoint: Endpoint, tiny_model: Path, tmp_path: Path) -> None:
    asked = choices_task(tmp_path)
    there, _ = answer_task(asked, endpoint, tmp_path / "there.jsonl", {})
    here, _ = answer_task(asked, InProcess(Assistant.load(tiny_model), 4), tmp_path / "here.jsonl", {})
    for item in asked.items:
        one, other = there.answered[item.id], here.answered[item.id]
        assert one.tokens == other.tokens
        assert one.likelihoods == pytest.approx(other.likelihoods, abs=TOLERANCE)
    assert findings_of(asked, there, partial=False).measures


def test_questions_are_answered_by_the_server(endpoint: Endpoint, tmp_path: Path) -> None:
    asked = open_task("scenes", None, limit=5)
    stored, new = answer_task(asked, endpoint, tmp_path / "kept.jsonl", {})
    assert new == len(asked.items) and not stored.failed
