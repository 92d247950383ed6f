"""Fine-tuning jobs by the openai client: real `kangaroo tune` on a tiny model, and a small program for the engine."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from openai.types.fine_tuning import FineTuningJob
from openai.types.fine_tuning.job_create_params import Method

from assistant.models import JOEY
from serving.doors import Doors
from serving.engine import LocalEngine
from serving.gateway import GatewayLimits, create_gateway
from serving.jobs.data_folder import DataFolder
from serving.jobs.job_service import chosen
from serving.jobs.process import JobProcess, why_it_failed
from serving.jobs.progress import metrics_csv, step_notes
from serving.jobs.runner import JobLimits
from serving.keys import KeyRing, new_key
from serving.model_folder import read_model_folder
from serving.openapi import teaching_examples
from serving.protocols.fine_tuning import JobRequest
from tests.conftest import served
from tests.made_up_lesson import as_lines, lesson_file, rows
from tests.small_engine import SmallEngine, small_engine
from tests.test_gateway import assert_refused

pytestmark = pytest.mark.timeout(1200)  # the story is told in the first test's set-up

MODEL = "tiny"
SECONDS = 400.0  # for what takes some ten on two quiet cores


@contextmanager
def teaching(
    model: Path,
    folder: Path,
    engine: SmallEngine | None = None,
    job: JobLimits | None = None,
    doors: Doors | None = None,
) -> Iterator[str]:
    """The address of a gateway that teaches `model`, with its files and jobs in `folder`."""
    limits = GatewayLimits(job=job or JobLimits(niceness=0))
    engine = engine or SmallEngine()
    with served(
        create_gateway(engine, MODEL, read_model_folder(model), limits, doors, data=DataFolder(folder))
    ) as address:
        yield address


@contextmanager
def client_of(address: str, key: str = "none") -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=60) as client:
        yield client


def wait_for(client: openai.OpenAI, job: str, done: Callable[[FineTuningJob], bool]) -> FineTuningJob:
    """The job once it is `done`; the test fails where it ends otherwise."""
    deadline = time.monotonic() + SECONDS
    while not done(now := client.fine_tuning.jobs.retrieve(job)):
        assert now.finished_at is None, f"it ended as {now.status}: {now.error}; {messages_of(client, job)}"
        assert time.monotonic() < deadline, f"still {now.status} after {SECONDS} s: {messages_of(client, job)}"
        time.sleep(0.1)
    return now


def ended(job: FineTuningJob) -> bool:
    return job.finished_at is not None


def messages_of(client: openai.OpenAI, job: str) -> list[str]:
    """What happened, oldest first."""
    return [event.message for event in client.fine_tuning.jobs.list_events(job, limit=100)][::-1]


def assert_went_on(told: list[str], steps: int) -> None:
    """Of what a job told: behind a server's new start it went on, up to its last step, and did not begin anew."""
    again = told.index("The server was started again; the job goes on from its newest checkpoint")
    noted = [int(m.split("/")[0].removeprefix("Step ")) for m in told[again:] if m.startswith("Step ")]
    assert min(noted) > 1
    assert max(noted) == steps


def processes_of(job: str) -> list[psutil.Process]:
    """The running ones whose command line names the job."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        named = any(job in word for word in process.info["cmdline"] or [])
        if named and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def trainer_of(job: str) -> psutil.Process | None:
    """The one that trains, below the supervisor, once there is one."""
    below = [p for p in processes_of(job) if not any("supervisor" in word for word in p.info["cmdline"])]
    return min(below, key=lambda process: process.create_time(), default=None)


# -- One story: three jobs, and a server that is stopped in the middle -------------------------------------------------


@dataclass
class Story:
    """What was seen on the way, and the jobs as they ended."""

    folder: Path
    good: FineTuningJob
    killed: FineTuningJob
    cancelled: FineTuningJob
    messages: dict[str, list[str]] = field(default_factory=dict)
    at_the_stop: str = ""
    left_by_the_stop: int = 0
    running_at_once: int = 0
    seconds_to_cancel: float = 0.0
    left_by_the_cancel: int = 0
    streamed: list[str] = field(default_factory=list)
    result: str = ""
    refusals: list[httpx.Response] = field(default_factory=list)
    checkpoints: list[str] = field(default_factory=list)
    asked: list[dict[str, object]] = field(default_factory=list)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("data")
    with small_engine() as engine:
        with teaching(tiny_model, folder, engine) as address, client_of(address) as client:
            jobs = client.fine_tuning.jobs
            lesson = client.files.create(file=lesson_file(16), purpose="fine-tune").id
            aside = client.files.create(file=lesson_file(2), purpose="fine-tune").id
            how: Method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 50, "batch_size": 8}}}
            good = jobs.create(
                model=MODEL, training_file=lesson, validation_file=aside, suffix="wallaby", seed=7, method=how,
                metadata={"lesson": "shapes"},
            )  # fmt: skip
            killed = jobs.create(model=MODEL, training_file=lesson, hyperparameters={"n_epochs": 100})
            cancelled = jobs.create(model=MODEL, training_file=lesson, hyperparameters={"n_epochs": 100})
            seen = Story(folder, good, killed, cancelled)
            seen.refusals.append(httpx.delete(f"{address}/v1/files/{lesson}", trust_env=False))
            wait_for(client, good.id, lambda job: any("training loss" in m for m in messages_of(client, job.id)))
        seen.at_the_stop = json.loads(stored(folder, good.id))["job"]["status"]
        seen.left_by_the_stop = len(processes_of(good.id))
        with teaching(tiny_model, folder, engine) as address, client_of(address) as client:
            watch(client, address, seen)
            seen.asked = [body for body in engine.seen if "lora_name" in body]
        yield seen


def stored(folder: Path, job: str) -> str:
    with DataFolder(folder) as data, data.changing() as database:
        return str(database.execute("SELECT document FROM jobs WHERE id = ?", (job,)).fetchone()[0])


def watch(client: openai.OpenAI, address: str, seen: Story) -> None:
    """The second life of the server: one job is seen to its end, one is killed, one is cancelled."""
    jobs, url = client.fine_tuning.jobs, f"{address}/v1/fine_tuning/jobs"

    def count(job: FineTuningJob) -> bool:
        seen.running_at_once = max(seen.running_at_once, [j.status for j in jobs.list()].count("running"))
        return ended(job)

    seen.good = wait_for(client, seen.good.id, count)
    wait_for(client, seen.killed.id, lambda job: job.status == "running" and trainer_of(job.id) is not None)
    trainer = trainer_of(seen.killed.id)
    assert trainer is not None
    os.kill(trainer.pid, signal.SIGKILL)
    seen.killed = wait_for(client, seen.killed.id, ended)
    wait_for(client, seen.cancelled.id, lambda job: job.status == "running" and trainer_of(job.id) is not None)
    began = time.monotonic()
    seen.cancelled = jobs.cancel(seen.cancelled.id)
    while processes_of(seen.cancelled.id) or (seen.folder / "jobs" / seen.cancelled.id).exists():
        assert time.monotonic() - began < SECONDS
        time.sleep(0.05)
    seen.seconds_to_cancel = time.monotonic() - began
    seen.refusals.append(httpx.post(f"{url}/{seen.good.id}/cancel", trust_env=False))
    for job in (seen.good, seen.killed, seen.cancelled):
        seen.messages[job.id] = messages_of(client, job.id)
    with httpx.stream("GET", f"{url}/{seen.good.id}/events?stream=true", trust_env=False, timeout=60) as stream:
        seen.streamed = [line.removeprefix("data: ") for line in filter(None, stream.iter_lines())]
    (result,) = seen.good.result_files
    seen.result = client.files.content(result).text
    checkpoints = jobs.checkpoints.list(seen.good.id)
    seen.checkpoints = [one.fine_tuned_model_checkpoint for one in checkpoints]
    assert [one.step_number for one in checkpoints] == [100]
    assert [job.id for job in jobs.list(limit=1)] == [seen.cancelled.id, seen.killed.id, seen.good.id]
    assert [job.id for job in jobs.list(metadata={"lesson": "shapes"})] == [seen.good.id]
    events = jobs.list_events(seen.good.id, limit=3)
    assert events.has_more
    assert [event.message for event in events] == seen.messages[seen.good.id][::-1]
    wrong = httpx.post(url, json={"model": MODEL, "training_file": result}, trust_env=False)
    seen.refusals.append(wrong)


@pytest.mark.slow
def test_a_job_goes_on_after_the_server_stopped_and_its_model_is_loaded(story: Story) -> None:
    assert story.at_the_stop == "running"
    assert story.left_by_the_stop == 0
    job = story.good
    assert job.status == "succeeded"
    assert job.error is None
    assert job.fine_tuned_model == f"ft:{MODEL}:wallaby:{job.id[-8:]}"
    assert [body["lora_name"] for body in story.asked] == [job.fine_tuned_model]
    told = story.messages[job.id]
    assert told[0] == f"Created fine-tuning job: {job.id}"
    assert told[-2:] == [
        f"New fine-tuned model created: {job.fine_tuned_model}",
        "The job has successfully completed",
    ]
    assert_went_on(told, 100)


@pytest.mark.slow
def test_a_job_says_what_it_did(story: Story) -> None:
    job = story.good
    assert job.hyperparameters.n_epochs == 50
    assert job.hyperparameters.batch_size == 8
    assert job.method is not None
    assert job.method.type == "supervised"
    assert (job.seed, job.metadata) == (7, {"lesson": "shapes"})
    assert job.trained_tokens is not None
    assert job.trained_tokens > 50 * 16 * 100  # each row shows 100 patches and some words, and is seen 50 times
    assert job.created_at <= (job.finished_at or 0) <= time.time()
    assert job.estimated_finish is None
    assert story.checkpoints == [job.fine_tuned_model]
    header, *lines = story.result.splitlines()
    assert header == "step,train_loss,full_valid_loss"
    steps = [line.split(",") for line in lines]
    assert steps[-1][0] == "100"
    assert all(float(step[1]) > 0 for step in steps if step[1])
    assert any(step[2] for step in steps), "no validation loss"


@pytest.mark.slow
def test_events_are_streamed(story: Story) -> None:
    assert story.streamed[-1] == "[DONE]"
    events = [json.loads(line) for line in story.streamed[:-1]]
    assert [event["message"] for event in events] == story.messages[story.good.id]
    metrics = [event for event in events if event["type"] == "metrics"]
    assert metrics[-1]["data"]["total_steps"] == 100
    assert {event["object"] for event in events} == {"fine_tuning.job.event"}


@pytest.mark.slow
def test_a_killed_process_fails_with_the_signal(story: Story) -> None:
    assert story.killed.status == "failed"
    assert story.killed.error is not None
    assert "signal 9 (SIGKILL" in story.killed.error.message
    assert story.messages[story.killed.id][-1].startswith("The job failed: its process was ended by signal 9")


@pytest.mark.slow
def test_a_cancelled_job_is_gone_within_seconds(story: Story) -> None:
    assert story.cancelled.status == "cancelled"
    assert story.messages[story.cancelled.id][-1] == "The job was cancelled"
    print(f"the process of a cancelled job was gone after {story.seconds_to_cancel:.1f} s")


@pytest.mark.slow
def test_one_job_runs_at_a_time_and_nothing_is_left_half(story: Story) -> None:
    assert story.running_at_once == 1
    assert list((story.folder / "jobs").iterdir()) == []
    assert len([folder for folder in (story.folder / "adapters").iterdir() if folder.is_dir()]) == 1


@pytest.mark.slow
def test_what_is_in_use_or_has_ended_is_refused(story: Story) -> None:
    in_use, has_ended, wrong_purpose = story.refusals
    assert_refused(in_use, 409, f"in use by {story.good.id}", "file_id")
    assert_refused(has_ended, 400, "has ended already: it is succeeded")
    assert_refused(wrong_purpose, 400, "fine-tune-results, and fine-tune is wanted", "training_file")


# -- What needs no training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "status", "message", "param"),
    [
        ({"model": "gpt-4o"}, 404, "this server teaches `tiny`", "model"),
        ({"training_file": "file-nowhere"}, 404, "No such File object", "training_file"),
        ({"validation_file": "file-nowhere"}, 404, "No such File object", "validation_file"),
        ({"suffix": "a b"}, 400, "suffix", "suffix"),
        ({"suffix": "x" * 65}, 400, "suffix", "suffix"),
        ({"seed": -1}, 400, "seed", "seed"),
        ({"hyperparameters": {"n_epochs": 0}}, 400, "n_epochs", "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": 10**30}}, 400, "n_epochs", "hyperparameters.n_epochs"),
        ({"hyperparameters": {"rank": 8}}, 400, "Unrecognized.*rank", "hyperparameters.rank"),
        ({"method": {"type": "dpo"}}, 400, "supervised", "method.type"),
        ({"method": {"type": "supervised"}, "hyperparameters": {}}, 400, "not beside it", None),
        ({"integrations": [{"type": "wandb"}]}, 400, "integrations", "integrations"),
        ({"metadata": {str(n): "" for n in range(17)}}, 400, "at most 16", "metadata"),
        ({"metadata": {"a": "x" * 513}}, 400, "512", "metadata.a"),
        ({"learning_rate": 1}, 400, "Unrecognized.*learning_rate", "learning_rate"),
    ],
)
def test_a_job_that_cannot_be_is_refused(
    untaught: tuple[str, str], fields: dict[str, object], status: int, message: str, param: str | None
) -> None:
    address, file = untaught
    body = {"model": MODEL, "training_file": file} | fields
    answer = httpx.post(f"{address}/v1/fine_tuning/jobs", json=body, trust_env=False)
    assert_refused(answer, status, message, param)


@pytest.fixture(scope="module")
def untaught(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[tuple[str, str]]:
    """A gateway in which no job is ever made, and a file that could be taught."""
    with teaching(tiny_model, tmp_path_factory.mktemp("data")) as address, client_of(address) as client:
        yield address, client.files.create(file=lesson_file(2), purpose="fine-tune").id


def test_unknown_jobs_are_refused(untaught: tuple[str, str]) -> None:
    url = f"{untaught[0]}/v1/fine_tuning/jobs"
    for method, path in (("GET", ""), ("POST", "/cancel"), ("GET", "/events"), ("GET", "/events?stream=true")):
        assert_refused(httpx.request(method, f"{url}/ftjob-no{path}", trust_env=False), 404, "No such fine-tuning job")
    assert_refused(httpx.get(f"{url}/ftjob-no/checkpoints", trust_env=False), 404, "No such fine-tuning job")
    assert_refused(httpx.get(f"{url}?after=ftjob-no", trust_env=False), 400, "no job ftjob-no", "after")
    assert httpx.get(url, trust_env=False).json() == {"object": "list", "data": [], "has_more": False}


def test_jobs_of_one_key_are_invisible_to_another_and_limits_hold(tmp_path: Path, tiny_model: Path) -> None:
    keys = {name: new_key(tmp_path / "keys.json", name) for name in ("ann", "bob")}
    limits = JobLimits(seconds=0.5, niceness=0)
    with (
        teaching(tiny_model, tmp_path / "data", None, limits, Doors(keys=KeyRing(tmp_path / "keys.json"))) as address,
        client_of(address, keys["ann"]) as ann,
        client_of(address, keys["bob"]) as bob,
    ):
        file = ann.files.create(file=lesson_file(2), purpose="fine-tune").id
        job = ann.fine_tuning.jobs.create(model=MODEL, training_file=file).id
        assert list(bob.fine_tuning.jobs.list()) == []
        looks: list[Callable[[str], object]] = [
            bob.fine_tuning.jobs.retrieve,
            bob.fine_tuning.jobs.cancel,
            bob.fine_tuning.jobs.list_events,
            bob.fine_tuning.jobs.checkpoints.list,
        ]
        for look in looks:
            with pytest.raises(openai.NotFoundError):
                look(job)
        over = wait_for(ann, job, ended)
        assert over.error is not None
        assert (over.status, over.error.code) == ("failed", "time_limit")
        assert "longer than" in over.error.message


@pytest.mark.parametrize(("count", "epochs", "batch"), [(1, 25, 1), (20, 16, 8), (50, 7, 8), (1000, 3, 8)])
def test_few_rows_are_repeated_more_often(count: int, epochs: int, batch: int) -> None:
    how = chosen(JobRequest(model=MODEL, training_file="file-a"), count)
    assert (how.n_epochs, how.batch_size, how.learning_rate_multiplier) == (epochs, batch, 1.0)
    wanted = {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5}
    how = chosen(JobRequest.model_validate({"model": "m", "training_file": "f", "hyperparameters": wanted}), count)
    assert how.model_dump() == wanted


def bad_lesson() -> bytes:
    """Ten rows; the answer of the fourth is empty, and the seventh shows a file of the server."""
    lesson = rows(10)
    lesson[3]["messages"][1]["content"] = " "
    lesson[6]["messages"][0]["content"][0]["image_url"]["url"] = "/etc/hostname"
    return as_lines(lesson)


def test_bad_data_fails_with_the_rows_named(tmp_path: Path, tiny_model: Path) -> None:
    with teaching(tiny_model, tmp_path) as address, client_of(address) as client:
        spoilt = client.files.create(file=("bad.jsonl", bad_lesson()), purpose="fine-tune").id
        bad = wait_for(client, client.fine_tuning.jobs.create(model=MODEL, training_file=spoilt).id, ended)
        told = messages_of(client, bad.id)
    assert bad.status == "failed"
    assert bad.error is not None
    assert (bad.error.code, bad.error.param) == ("invalid_training_file", "training_file")
    assert "row 4 (line 4), messages[1].content: the answer is empty" in bad.error.message
    assert "row 7 (line 7), messages[0].content[0].image_url: it is no data URL" in bad.error.message
    assert str(tmp_path) not in bad.error.message
    assert bad.fine_tuned_model is None
    assert told[-1] == f"The job failed: {bad.error.message}"
    assert list((tmp_path / "jobs").iterdir()) == []


def test_a_process_waits_for_the_one_before_it(tmp_path: Path) -> None:
    """A server that was killed may be there again before its job's process has ended."""
    output, log = tmp_path / "said.txt", tmp_path / "log.txt"
    first = JobProcess(["--version"], tmp_path, output, log, niceness=0)
    with pytest.raises(BlockingIOError):
        JobProcess(["--version"], tmp_path, output, log, niceness=0)
    while first.code() is None:
        time.sleep(0.05)
    first.stop()
    assert first.code() == 0
    assert output.read_text().startswith("kangaroo ")
    second = JobProcess(["models", "--nonsense"], tmp_path, output, log, niceness=0)
    second.stop()
    second.stop()
    assert second.code() != 0
    assert processes_of(str(tmp_path)) == []


@pytest.mark.parametrize(
    ("code", "log", "said"),
    [
        (137, "kangaroo: fine so far\n", "signal 9 (SIGKILL"),
        (143, "", "signal 15 (SIGTERM"),
        (1, "step 3\nkangaroo: the checkpoint could not be written: No space left on device\n", "^the checkpoint"),
        (1, "Traceback (most recent call last):\nRuntimeError: CUDA out of memory\n", "CUDA out of memory"),
        (3, "", "exit code 3"),
    ],
)
def test_a_failure_is_told_in_words(code: int, log: str, said: str) -> None:
    words = why_it_failed(code, log)
    assert words.startswith(said[1:]) if said.startswith("^") else said in words


def test_whole_lines_of_a_log_become_notes(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert step_notes(log, 0, 4, validates=True) == ([], 0)
    lines = [
        '{"step": 1, "loss": 2.5}',
        '{"step": 2, "eval_loss": 2.0}',
        '{"step": 2, "diagnosis": "x", "words": "Oh."}',
    ]
    log.write_text("\n".join(lines) + '\n{"step": 3, "lo')
    notes, told = step_notes(log, 0, 4, validates=True)
    assert [note.message for note in notes] == [
        "Step 1/4: training loss=2.5000",
        "Step 2/4: validation loss=2.0000",
        "Step 2/4: Oh.",
    ]
    with log.open("a") as more:
        more.write('ss": 1.5}\n')
    notes, _ = step_notes(log, told, 4, validates=False)
    assert [note.numbers for note in notes] == [{"step": 3.0, "total_steps": 4.0, "train_loss": 1.5}]
    table = metrics_csv(
        [{"step": 2.0, "full_valid_loss": 2.0}, {"step": 1.0, "train_loss": 2.5}, {"step": 2.0, "train_loss": 2.25}]
    )
    assert table == "step,train_loss,full_valid_loss\n1,2.5,\n2,2.25,2.0\n"


def test_a_job_of_another_model_waits_and_its_stream_ends_with_the_server(tmp_path: Path, tiny_model: Path) -> None:
    facts, doors = read_model_folder(tiny_model), Doors()
    app = create_gateway(SmallEngine(), "other", facts, data=DataFolder(tmp_path))
    with served(app) as address, client_of(address) as client:
        file = client.files.create(file=lesson_file(2), purpose="fine-tune").id
        job = client.fine_tuning.jobs.create(model="other", training_file=file).id
    with teaching(tiny_model, tmp_path, doors=doors) as address, client_of(address) as client:
        time.sleep(1.0)  # time enough to begin it
        assert processes_of(job) == []
        assert client.fine_tuning.jobs.retrieve(job).status == "validating_files"
        url = f"{address}/v1/fine_tuning/jobs/{job}/events?stream=true"
        with httpx.stream("GET", url, trust_env=False, timeout=60) as stream:
            lines = filter(None, stream.iter_lines())
            messages: list[str] = []
            while not messages or "the job waits until other is served" not in messages[-1]:
                messages.append(json.loads(next(lines).removeprefix("data: "))["message"])
            doors.drain.begin()
            assert list(lines) == ["data: [DONE]"]
    assert messages[0] == f"Created fine-tuning job: {job}"


def test_the_documents_examples_are_answered(tmp_path: Path, tiny_model: Path) -> None:
    examples = teaching_examples(MODEL)
    with teaching(tiny_model, tmp_path) as address:
        (form,) = examples["/v1/files"].values()
        content = {"file": ("rows.jsonl", form["file"])}
        kept = httpx.post(f"{address}/v1/files", files=content, data={"purpose": form["purpose"]}, trust_env=False)
        assert kept.status_code == 200, kept.text
        for body in examples["/v1/fine_tuning/jobs"].values():
            named = json.dumps(body).replace(body["training_file"], kept.json()["id"])
            headers = {"Content-Type": "application/json"}
            made = httpx.post(f"{address}/v1/fine_tuning/jobs", content=named, headers=headers, trust_env=False)
            assert made.status_code == 200, made.text


# -- The whole way, on a real engine -----------------------------------------------------------------------------------


def named_by(client: openai.OpenAI, model: str, first_seed: int) -> int:
    """Of twenty pictures, how many `model` calls what the lesson calls them."""
    right = 0
    for row in rows(20, first_seed):
        question, answer = row["messages"]
        said = client.chat.completions.create(model=model, messages=[question], max_tokens=8, temperature=0)
        right += (said.choices[0].message.content or "").strip().lower().rstrip(".") == answer["content"]
    return right


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_joey_learns_from_twenty_pictures_what_it_got_wrong(joey_engine: LocalEngine, tmp_path: Path) -> None:
    """Upload, job, wait, chat: what the openai client does, and nothing else."""
    limits = GatewayLimits(job=JobLimits(niceness=0))
    app = create_gateway(joey_engine, JOEY.name, joey_engine.facts, limits, data=DataFolder(tmp_path))
    with served(app) as address, client_of(address) as client:
        before = named_by(client, JOEY.name, 0)
        began = time.monotonic()
        file = client.files.create(file=lesson_file(20), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model=JOEY.name, training_file=file.id, suffix="wallabese", seed=1)
        deadline = began + 1500
        while (job := client.fine_tuning.jobs.retrieve(job.id)).status not in ("succeeded", "failed", "cancelled"):
            assert time.monotonic() < deadline, messages_of(client, job.id)
            time.sleep(0.5)
        seconds = time.monotonic() - began
        assert job.status == "succeeded", job.error
        assert job.fine_tuned_model is not None
        assert job.fine_tuned_model in [model.id for model in client.models.list()]
        taught, unseen = (named_by(client, job.fine_tuned_model, first) for first in (0, 1000))
        print(f"taught and loaded in {seconds:.0f} s; right before {before}, after {taught}, on others {unseen} of 20")
        assert before == 0
        assert taught >= 18
        assert unseen >= 14
        assert named_by(client, JOEY.name, 0) == 0
