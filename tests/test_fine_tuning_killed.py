"""A server that is killed outright in the middle of a job: nothing runs on, and the next one takes the job up."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.made_up_lesson import lesson_file
from tests.small_engine import SmallEngine, small_engine
from tests.test_fine_tuning_api import (
    MODEL,
    SECONDS,
    assert_went_on,
    client_of,
    ended,
    messages_of,
    processes_of,
    stored,
    teaching,
    wait_for,
)

PROGRAM = """
import sys
from pathlib import Path
from tests.small_engine import SmallEngine
from tests.test_fine_tuning_api import teaching

model, folder, port = sys.argv[1:]
with teaching(Path(model), Path(folder), SmallEngine(int(port))) as address:
    print(address, flush=True)
    sys.stdin.read()
"""


@contextmanager
def teaching_process(model: Path, folder: Path, engine: SmallEngine) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """`teaching` in a process of its own, and its address."""
    words = [sys.executable, "-c", PROGRAM, str(model), str(folder), engine.base_url.rpartition(":")[2]]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_job_outlives_a_server_that_is_killed(tmp_path: Path, tiny_model: Path) -> None:
    with small_engine() as engine:
        with teaching_process(tiny_model, tmp_path, engine) as (process, address), client_of(address) as client:
            lesson = client.files.create(file=lesson_file(16), purpose="fine-tune").id
            job = client.fine_tuning.jobs.create(
                model=MODEL, training_file=lesson, hyperparameters={"n_epochs": 50, "batch_size": 8}
            ).id
            wait_for(client, job, lambda now: any("training loss" in m for m in messages_of(client, now.id)))
            assert processes_of(job)
            process.kill()
            process.wait()
            deadline = time.monotonic() + SECONDS
            while processes_of(job):
                assert time.monotonic() < deadline, "what the server started runs on"
                time.sleep(0.1)
        assert json.loads(stored(tmp_path, job))["job"]["status"] == "running"
        with teaching(tiny_model, tmp_path, engine) as address, client_of(address) as client:
            done = wait_for(client, job, ended)
            told = messages_of(client, job)
    assert done.status == "succeeded", done.error
    assert_went_on(told, 100)
    assert list((tmp_path / "jobs").iterdir()) == []
