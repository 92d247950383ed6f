"""Asking a server that fails: what passes is tried again, the rest is named, and no failure is a wrong answer."""

import json
import time
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.faulty_server import MODEL, Fault, completion, faulty_server
from training.evaluation.assistant_report import Wanted, examine_assistant, predictions_file
from training.evaluation.endpoint import STOP_AFTER, EndpointError, EndpointSettings
from training.evaluation.predictions import PredictionError
from training.evaluation.task_run import IncompleteError
from ui.command_line import app

QUESTIONS = 12  # three about each of four pictures; the even ones are answered with yes


def right(question: str, tries: int) -> str:
    return "Yes." if int(question.split()[-1]) % 2 == 0 else "No."


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """The file of a yes/no task of one's own."""
    rows = []
    for number in range(QUESTIONS):
        picture = tmp_path / f"{number // 3}.png"
        Image.new("RGB", (40, 30), (10 * number, 0, 0)).save(picture)
        answer = "yes" if number % 2 == 0 else "no"
        rows.append({"id": f"q{number}", "image": picture.name, "question": f"Is it {number}", "answer": answer})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "own.yaml"
    file.write_text("about: mine\nkind: yes_no\ndata: {file: rows.jsonl}\nmax_tokens: 8\n")
    return file


def wanted(task: Path, url: str, partial: bool = False, **more: float) -> Wanted:
    settings = {"retries": 2, "timeout": 20.0, "at_once": 4} | more
    endpoint = EndpointSettings(url, **settings)  # type: ignore[arg-type]
    return Wanted((str(task),), task.with_name("report.json"), partial=partial, endpoint=endpoint)


def accuracy_of(report: dict) -> float:
    return next(s["value"] for s in report["tasks"][0]["scores"] if s["score"] == "accuracy")


def test_all_is_asked_once_as_openai_clients_ask(task: Path) -> None:
    with faulty_server(right) as server:
        report = examine_assistant(None, wanted(task, server.url)).report
    assert accuracy_of(report) == 1
    assert report["model"]["name"] == MODEL
    assert report["tasks"][0]["pictures_decoded"] == 4
    assert sorted(server.asked.values()) == [1] * QUESTIONS
    (body,) = (b for b in server.bodies if b["messages"][0]["content"][1]["text"] == "Is it 5")
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert (body["temperature"], body["max_tokens"], body["model"]) == (0, 8, MODEL)


def test_so_many_are_on_the_way_and_no_more(task: Path) -> None:
    with faulty_server(right, gather=4) as server:
        examine_assistant(None, wanted(task, server.url))
        assert server.most_at_once == 4


@pytest.mark.parametrize(
    "fault",
    [
        Fault(500, {"error": {"message": "boom"}}),
        Fault(503, "<html>"),
        Fault(429, {"error": {"message": "slow down"}}),
        Fault(hangs_up=True),
        Fault(seconds=4, body=completion("Yes.")),
    ],
)
def test_what_passes_is_tried_again(task: Path, fault: Fault) -> None:
    """The first two tries of two questions fail; the third one is right."""

    def rule(question: str, tries: int) -> str | Fault:
        return fault if question in ("Is it 0", "Is it 7") and tries < 3 else right(question, tries)

    with faulty_server(rule) as server:
        report = examine_assistant(None, wanted(task, server.url, timeout=2.0 if fault.seconds else 20.0)).report
    assert accuracy_of(report) == 1
    assert server.asked["Is it 7"] == server.asked["Is it 0"] == 3
    assert sum(server.asked.values()) == QUESTIONS + 4


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (Fault(body="<html>welcome</html>"), "no JSON"),
        (Fault(body='{"choices": [{"mess'), "no JSON"),
        (Fault(body="[1, 2]"), "something else"),
        (Fault(body={}), "something else"),
        (Fault(body={"choices": []}), "something else"),
        (Fault(body=completion(None)), "without words"),
        (Fault(400, {"error": {"message": "this picture is not wanted"}}), "status 400: .*not wanted"),
        (Fault(500, "oh"), "status 500"),
        (Fault(seconds=4, body=completion("Yes.")), "no answer within 2 seconds"),
    ],
)
def test_what_does_not_pass_is_named_and_counts_nowhere(task: Path, fault: Fault, why: str) -> None:
    def rule(question: str, tries: int) -> str | Fault:
        return fault if question == "Is it 4" else right(question, tries)

    how = {"retries": 0, "timeout": 2.0} if fault.seconds else {"retries": 1}
    with faulty_server(rule) as server:
        with pytest.raises(IncompleteError, match=f"1 of 12 questions are not answered .q4: .*{why}.*--partial"):
            examine_assistant(None, wanted(task, server.url, **how))
        report = examine_assistant(None, wanted(task, server.url, partial=True, **how)).report
    (told,) = report["tasks"]
    assert told["partial"] and [one["id"] for one in told["unanswered"]] == ["q4"]
    assert (told["answered"], told["answered_now"], accuracy_of(report)) == (11, 0, 1)
    assert "1 of 12 questions are not answered" in told["notes"][0]
    # The server mends its ways: the same command asks that one question, and all is well.
    with faulty_server(right, int(server.url.split(":")[2].split("/")[0])) as mended:
        report = examine_assistant(None, wanted(task, server.url)).report
    assert mended.asked == {"Is it 4": 1}
    assert (report["tasks"][0]["partial"], accuracy_of(report)) == (False, 1)


def test_a_server_that_goes_down_stops_the_run_which_goes_on_from_there(task: Path) -> None:
    def rule(question: str, tries: int) -> str | Fault:
        if sum(server.asked.values()) > 5:
            server.stop()
            return Fault(hangs_up=True)
        return right(question, tries)

    with faulty_server(rule) as server:
        port = int(server.url.split(":")[2].split("/")[0])
        with pytest.raises(EndpointError, match="cannot be reached in 2 tries"):
            examine_assistant(None, wanted(task, server.url, at_once=1, retries=1))
    file = predictions_file(task.with_name("report.json"), "own")
    kept = {json.loads(line)["id"] for line in file.read_text().splitlines()[1:]}
    assert len(kept) == 5
    with file.open("a") as lines:
        lines.write('{"id": "q11", "ans')  # as a run that is killed leaves it
    with faulty_server(right, port) as again:
        report = examine_assistant(None, wanted(task, server.url)).report
    assert len(again.asked) == QUESTIONS - 5 and not kept & {f"q{q.split()[-1]}" for q in again.asked}
    assert (report["tasks"][0]["answered_now"], accuracy_of(report)) == (7, 1)


def test_when_all_fails_the_run_stops_early(task: Path) -> None:
    with (
        faulty_server(lambda question, tries: Fault(500, {"error": {"message": "out of memory"}})) as server,
        pytest.raises(EndpointError, match=f"{STOP_AFTER} questions in a row failed, .*out of memory"),
    ):
        examine_assistant(None, wanted(task, server.url, retries=0, at_once=1))
    assert sum(server.asked.values()) == STOP_AFTER


def test_a_wrong_key_or_model_is_said_at_once(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty_server(right, key="secret") as server:
        with pytest.raises(EndpointError, match=r"refuses: status 401.*--api-key-env"):
            examine_assistant(None, wanted(task, server.url))
        monkeypatch.setenv("THE_KEY", "secret")
        words = ["evaluate", "--endpoint", server.url, "--task", str(task), "--out", str(task.with_name("r.json"))]
        done = CliRunner().invoke(app, [*words, "--api-key-env", "THE_KEY"])
        assert done.exit_code == 0, done.stderr
        assert "secret" not in task.with_name("r.json").read_text() + done.output
        done = CliRunner().invoke(app, [*words, "--api-key-env", "NO_KEY"])
        assert (done.exit_code, done.stderr.count("NO_KEY")) == (1, 1)
    with faulty_server(right, models=("one", "two")) as server:
        with pytest.raises(EndpointError, match="name one of its models: one, two"):
            examine_assistant(None, wanted(task, server.url))
        with pytest.raises(EndpointError, match="has no model three: one, two"):
            examine_assistant("three", wanted(task, server.url))
        assert accuracy_of(examine_assistant("two", wanted(task, server.url)).report) == 1


def test_answers_of_another_model_are_not_gone_on_from(task: Path) -> None:
    with faulty_server(right, models=("one", "two")) as server:
        examine_assistant("one", wanted(task, server.url))
        with pytest.raises(PredictionError, match=r"another run .*name"):
            examine_assistant("two", wanted(task, server.url))


def test_a_server_that_weighs_nothing_is_not_asked_for_choices(task: Path) -> None:
    rows = [{"image": "0.png", "question": "Is it 0", "answer": "a", "choices": ["a", "b"]}]
    task.with_name("rows.jsonl").write_text(json.dumps(rows[0]) + "\n")
    task.write_text("about: mine\nkind: choices\ndata: {file: rows.jsonl}\n")
    refusal = Fault(400, {"error": {"message": "prompt_logprobs: unknown field"}})
    for rule in (right, lambda question, tries: refusal):
        with (
            faulty_server(rule) as server,
            pytest.raises(EndpointError, match=r"does not weigh given texts.*without --endpoint"),
        ):
            examine_assistant(None, wanted(task, server.url))
        predictions_file(task.with_name("report.json"), "own").unlink()


def weighed(tokens: list[tuple[int, float, str]]) -> dict:
    """A completion with `prompt_logprobs: 0` in the shape that vLLM documents; the first token has none."""
    places = [{str(id): {"logprob": value, "rank": 1, "decoded_token": text}} for id, value, text in tokens]
    return completion("x") | {"prompt_logprobs": [None, *places]}


def test_the_likelihood_of_a_choice_is_summed_over_its_own_tokens(task: Path) -> None:
    """Those behind the prompt that the question alone makes, without the line break behind the end of the turn."""
    rows = {"id": "q", "image": "0.png", "question": "Is it 0", "answer": "a", "choices": ["a", "b c"]}
    task.with_name("rows.jsonl").write_text(json.dumps(rows) + "\n")
    task.write_text("about: mine\nkind: choices\ndata: {file: rows.jsonl}\n")
    prompt = [(7, -3.0, "<image>"), (9, -2.0, "Is")]
    ends = [(2, -0.25, "</s>"), (13, -5.0, "\n")]
    bodies = {
        None: weighed(prompt),
        "a": weighed([*prompt, (20, -1.0, "a"), *ends]),
        "b c": weighed([*prompt, (21, -0.5, "b"), (22, -0.5, "c"), *ends]),
    }

    def rule(question: str, tries: int) -> Fault:
        messages = server.bodies[-1]["messages"]
        return Fault(body=bodies[messages[1]["content"] if len(messages) > 1 else None])

    with faulty_server(rule) as server:
        report = examine_assistant(None, wanted(task, server.url, at_once=1)).report
        assert [body["prompt_logprobs"] for body in server.bodies] == [0, 0, 0]
        assert [body.get("add_generation_prompt") for body in server.bodies] == [None, False, False]
    file = predictions_file(task.with_name("report.json"), "own")
    kept = json.loads(file.read_text().splitlines()[1])
    assert (kept["likelihoods"], kept["tokens"]) == ([-1.25, -1.25], [2, 3])
    assert [score["value"] for score in report["tasks"][0]["scores"]] == [0.0, 1.0]
    bodies["a"] = weighed([(8, -3.0, "other"), *prompt])
    file.unlink()
    with faulty_server(rule) as server, pytest.raises(EndpointError, match="does not begin as the prompt without"):
        examine_assistant(None, wanted(task, server.url, at_once=1))


def test_nothing_there_is_said_in_one_line(task: Path) -> None:
    words = ["evaluate", "--endpoint", "http://127.0.0.1:9/v1", "--task", str(task), "--retries", "0"]
    done = CliRunner().invoke(app, [*words, "--out", str(task.with_name("r.json"))])
    assert (done.exit_code, len(done.stderr.splitlines())) == (1, 1)
    assert "http://127.0.0.1:9/v1 cannot be reached in 1 try" in done.stderr


def test_waiting_for_one_answer_does_not_hold_up_the_others(task: Path) -> None:
    """The first question is answered when all others have been asked."""
    asked_by_then: list[int] = []

    def rule(question: str, tries: int) -> str:
        started = time.monotonic()
        while question == "Is it 0" and len(server.asked) < QUESTIONS and time.monotonic() < started + 30:
            time.sleep(0.01)
        if question == "Is it 0":
            asked_by_then.append(len(server.asked))
        return right(question, tries)

    with faulty_server(rule) as server:
        report = examine_assistant(None, wanted(task, server.url, timeout=60.0)).report
    assert asked_by_then == [QUESTIONS]
    assert accuracy_of(report) == 1
