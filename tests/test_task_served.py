"""A task asked of a served Joey comes out as the same task asked of Joey in this process, answer by answer."""

import json
from typing import Any

import httpx
import pytest

from training.data.scenes import EVALUATION_SEED, make_scene
from training.evaluation.assistant_report import AssistantFindings, Wanted, examine_assistant
from training.evaluation.endpoint import EndpointSettings

COLOURS = ("red", "green", "blue", "yellow")
SCENES = 6


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The shipped scenes, and two tasks of one's own: yes or no, and choices by likelihood."""
    folder = tmp_path_factory.mktemp("tasks")
    rows: dict[str, list[dict[str, Any]]] = {"yes_no": [], "choices": []}
    for number in range(SCENES):
        scene = make_scene(EVALUATION_SEED + number)
        scene.image.save(folder / f"{number}.png")
        picture = {"image": f"{number}.png"}
        for colour in COLOURS:
            is_there = {"question": f"Is there a {colour} shape?", "answer": "yes" if number % 2 else "no"}
            rows["yes_no"].append(picture | {"id": f"{number} {colour}"} | is_there)
        chosen = {"question": "Which colour is there?", "choices": COLOURS, "answer": COLOURS[number % len(COLOURS)]}
        rows["choices"].append(picture | {"id": f"{number}"} | chosen)
    for kind, lines in rows.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        about = f"about: mine\nkind: {kind}\ndata: {{file: {kind}.jsonl}}\n"
        (folder / f"{kind}.yaml").write_text(about + ("max_tokens: 8\n" if kind == "yes_no" else ""))
    return ("scenes", *(str(folder / f"{kind}.yaml") for kind in rows))


@pytest.fixture(scope="module")
def in_process(tasks: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> AssistantFindings:
    return examine_assistant(None, Wanted(tasks, tmp_path_factory.mktemp("here") / "report.json", limit=SCENES))


@pytest.fixture(scope="module")
def served(
    tasks: tuple[str, ...], joey_gateway: httpx.Client, tmp_path_factory: pytest.TempPathFactory
) -> AssistantFindings:
    endpoint = EndpointSettings(f"{joey_gateway.base_url}/v1", at_once=4)
    out = tmp_path_factory.mktemp("served") / "report.json"
    return examine_assistant(None, Wanted(tasks, out, limit=SCENES, endpoint=endpoint))


def test_every_answer_is_the_same(in_process: AssistantFindings, served: AssistantFindings) -> None:
    """Words to the letter, likelihoods within what the order of additions changes in float32."""
    for here, there in zip(in_process.tasks, served.tasks, strict=True):
        assert here.predictions.keys() == there.predictions.keys() and here.predictions
        for name, one in here.predictions.items():
            other = there.predictions[name]
            assert (one.answer, one.tokens, one.failed) == (other.answer, other.tokens, None), name
            assert (other.likelihoods or ()) == pytest.approx(one.likelihoods or (), abs=0.01), name


def test_so_are_the_scores(in_process: AssistantFindings, served: AssistantFindings) -> None:
    for here, there in zip(in_process.report["tasks"], served.report["tasks"], strict=True):
        assert here["scores"]
        for one, other in zip(here["scores"], there["scores"], strict=True):
            assert one["score"] == other["score"]
            assert other["value"] == one["value"], one["score"]


def test_the_model_knows_something(served: AssistantFindings) -> None:
    """Or equal scores would prove little."""
    scores = {score["score"]: score["value"] for score in served.report["tasks"][0]["scores"]}
    assert scores["accuracy"] > 0.7
