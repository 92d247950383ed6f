"""The life of the gateway: it drains, ends at once when told twice, and lets go of clients that are slow or gone."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import serving.patience
from assistant.models import find_model
from serving.admission import Drain
from serving.doors import Doors
from serving.engine import Engine, LocalEngine, free_port
from serving.gateway import create_gateway
from serving.model_folder import ModelFacts, read_model_folder
from serving.patience import PatientProtocol
from tests.conftest import served
from tests.small_engine import small_engine
from tests.test_engine import ROOT, wait_until

PATH = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "joey", "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture(scope="module")
def facts() -> ModelFacts:
    return read_model_folder(find_model(None))


@contextlib.contextmanager
def gateway_process(engine: Engine, folder: Path, *more: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`kangaroo serve` before `engine`, as people run it, once it is ready; and its address.

    It writes to files in `folder`: a line for each request would fill a pipe that nobody reads, and then it waits.
    """
    port = free_port()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_DATA_HOME": str(folder)}
    environment["ENGINE_KEY"] = engine.api_key or ""
    command = [sys.executable, "-m", "ui.command_line", "serve", "--port", str(port)]
    command += ["--engine-url", engine.base_url, "--engine-key-env", "ENGINE_KEY", *more]
    with (
        (folder / "output").open("wb") as output,
        (folder / "errors").open("wb") as errors,
        subprocess.Popen(command, env=environment, stdout=output, stderr=errors) as process,
    ):
        address = f"http://127.0.0.1:{port}"
        try:
            wait_until(lambda: status_of(f"{address}/ready") == 200, 240, "the gateway is ready")
            yield process, address
        finally:
            process.kill()


def status_of(url: str) -> int | None:
    try:
        return httpx.get(url, timeout=30, trust_env=False).status_code
    except httpx.TransportError:
        return None


def ask(address: str, **fields: object) -> httpx.Response:
    return httpx.post(address + PATH, json=BODY | fields, timeout=120, trust_env=False)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_running_answers_finish_and_new_requests_are_told_to_come_back(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    with (
        small_engine() as engine,
        gateway_process(engine, tmp_path) as (process, address),
        ThreadPoolExecutor(4) as pool,
    ):
        engine.go_on.clear()
        running = [pool.submit(ask, address, stream=stream) for stream in (True, False, True, False)]
        wait_until(lambda: len(engine.seen) == 4, 60, "the engine works on all of them")
        process.send_signal(number)
        wait_until(lambda: status_of(f"{address}/ready") == 503, 30, "it drains")
        answer = ask(address)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "stopping"
        assert int(answer.headers["retry-after"]) > 0
        assert process.poll() is None
        engine.go_on.set()
        answers = [each.result(60) for each in running]
        assert [each.status_code for each in answers] == [200] * 4
        assert all("Yes." in each.text for each in answers)
        assert all("[DONE]" in each.text for each in answers[::2])
        returned = process.wait(60)
        errors = (tmp_path / "errors").read_text()
        assert returned == code, errors
        assert "It asks for no key" in (tmp_path / "output").read_text()
        assert "Finishing 4 answers" in errors
        assert "Traceback" not in errors


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    with (
        small_engine() as engine,
        gateway_process(engine, tmp_path) as (process, address),
        ThreadPoolExecutor(1) as pool,
    ):
        engine.go_on.clear()
        running = pool.submit(ask, address)
        wait_until(lambda: len(engine.seen) == 1, 60, "the engine works on it")
        process.send_signal(signal.SIGINT)
        wait_until(lambda: status_of(f"{address}/ready") == 503, 30, "it drains")
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert time.monotonic() - started < 20, "it would have waited 25 s for the answer"
        with contextlib.suppress(httpx.TransportError):
            assert running.result(60).status_code >= 500


def test_the_time_to_finish_is_bounded() -> None:
    now = 0.0
    drain = Drain(25, clock=lambda: now)
    assert not drain.is_over()
    drain.running = 2
    drain.begin()
    assert not drain.is_over()
    now = 10.0
    drain.begin()  # a second signal does not begin it anew
    now = 24.9
    assert not drain.is_over()
    now = 25.0
    assert drain.is_over()
    now, drain.running = 1.0, 0
    assert drain.is_over()


def test_without_keys_in_the_named_file_nothing_starts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ui.command_line", "serve", "--keys", str(tmp_path / "none.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 1
    assert "kangaroo key new" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# -- Slow clients ------------------------------------------------------------------------------------------------------

HALF_HEAD = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nX-Half: ".encode()


def is_closed(connection: socket.socket, seconds: float) -> bool:
    """Whether the other side closes it in this time."""
    connection.settimeout(seconds)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_two_hundred_half_heads_do_not_keep_others_out_and_are_dropped(
    facts: ModelFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert serving.patience.SECONDS_FOR_A_HEAD <= 10
    with small_engine() as engine, served(create_gateway(engine, "joey", facts)) as address:
        monkeypatch.setattr(serving.patience, "SECONDS_FOR_A_HEAD", 3600.0)
        with two_hundred_half_heads(address) as halves:
            assert ask(address).status_code == 200
            assert not any(is_closed(half, 0.001) for half in halves), "they were there meanwhile"
        monkeypatch.setattr(serving.patience, "SECONDS_FOR_A_HEAD", 1.0)
        with two_hundred_half_heads(address) as halves:
            assert all(is_closed(half, 60) for half in halves)
        assert ask(address).status_code == 200


@contextlib.contextmanager
def two_hundred_half_heads(address: str) -> Iterator[list[socket.socket]]:
    """Connections that sent between nothing and nearly a whole head."""
    with contextlib.ExitStack() as stack:
        halves = [stack.enter_context(connection_to(address)) for _ in range(200)]
        for number, half in enumerate(halves):
            half.sendall(HALF_HEAD[: number % len(HALF_HEAD)])
        yield halves


def test_a_connection_that_the_engine_drops_is_no_answer(facts: ModelFacts) -> None:
    """It closes those that nobody used for a while, and one may be taken just then; twice in a row is a fault."""
    with small_engine() as engine, served(create_gateway(engine, "joey", facts)) as address:
        assert ask(address).status_code == 200
        for stream in (False, True):
            engine.drops, engine.seen = 1, []
            answer = ask(address, stream=stream)
            assert answer.status_code == 200 and "Yes." in answer.text
            assert len(engine.seen) == 2 and engine.seen[0] == engine.seen[1]
        engine.drops, engine.seen = 2, []
        answer = ask(address)
        assert answer.status_code == 503 and answer.headers["Retry-After"]
        assert len(engine.seen) == 2
        assert ask(address).status_code == 200


def connection_to(address: str) -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), 30)


def test_a_head_that_trickles_in_is_dropped_whatever_came_before(
    facts: ModelFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving.patience, "SECONDS_FOR_A_HEAD", 1.5)
    with (
        small_engine() as engine,
        served(create_gateway(engine, "joey", facts)) as address,
        connection_to(address) as connection,
    ):
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}}"):  # head and body may come one after the other
            more = connection.recv(4096)
            assert more, "the first request is answered whole"
            answer += more
        assert answer.startswith(b"HTTP/1.1 200 OK")
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: ")
        connection.settimeout(0.1)
        answered = b"nothing yet"
        for _ in range(600):
            # What is sent to a connection that was dropped is an error, then or with the next letter.
            try:
                connection.sendall(b"x")
                answered = connection.recv(4096)
            except TimeoutError:
                continue
            except OSError:
                answered = b""
            break
        assert answered == b"", "it was dropped without a word"


@pytest.mark.parametrize("stream", [True, False])
def test_who_does_not_read_the_answer_is_dropped(
    stream: bool, facts: ModelFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving.patience, "SECONDS_FOR_A_READER", 1.0)
    dropped = threading.Event()
    drop = PatientProtocol._drop

    def drop_and_tell(protocol: PatientProtocol) -> None:
        drop(protocol)
        dropped.set()

    monkeypatch.setattr(PatientProtocol, "_drop", drop_and_tell)
    doors = Doors()
    with small_engine() as engine, served(create_gateway(engine, "joey", facts, doors=doors)) as address:
        engine.text = "x" * 30_000_000
        with connection_to(address) as connection:
            send_question(connection, stream)
            assert dropped.wait(60)
            received = 0
            with contextlib.suppress(OSError):
                while piece := connection.recv(2**20):
                    received += len(piece)
            assert 0 < received < 30_000_000, "it was dropped with the answer half way"
        wait_until(lambda: doors.drain.running == 0, 30, "nothing runs for it")
        engine.text = "Yes."
        assert ask(address).status_code == 200


def send_question(connection: socket.socket, stream: bool, **fields: object) -> None:
    """The request as a client sends it that is about to do something unusual."""
    body = json.dumps(BODY | {"stream": stream} | fields).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)


@pytest.mark.parametrize("stream", [False, True])
def test_half_an_answer_that_the_engine_breaks_off_is_none(stream: bool, facts: ModelFacts) -> None:
    """As vLLM does when it is told to stop: it ends what it works on, and calls that an answer."""
    with small_engine() as engine, served(create_gateway(engine, "joey", facts)) as address:
        engine.finish_reason = "abort"
        answer = ask(address, stream=stream)
        if stream:
            assert answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n")
            event = json.loads(answer.text.split("\n\n")[0].removeprefix("data: "))
            assert event["error"]["message"] == "The engine stopped in the middle of the answer."
        else:
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
            assert answer.json()["error"]["message"] == "The engine stopped while it worked on this request."


def test_a_stream_that_ends_without_a_reason_is_no_answer(facts: ModelFacts) -> None:
    """As vLLM's does where it stopped the request before its first token."""
    with small_engine() as engine, served(create_gateway(engine, "joey", facts)) as address:
        assert "error" not in ask(address, stream=True).text
        engine.finish_reason, engine.text = None, ""
        answer = ask(address, stream=True)
        *_, event, done, _ = answer.text.split("\n\n")
        assert done == "data: [DONE]"
        told = json.loads(event.removeprefix("data: "))
        assert told["error"]["message"] == "The engine stopped in the middle of the answer."


# -- Clients that go away ----------------------------------------------------------------------------------------------


def test_nothing_runs_for_clients_that_have_gone(facts: ModelFacts) -> None:
    doors = Doors()
    with small_engine() as engine, served(create_gateway(engine, "joey", facts, doors=doors)) as address:
        engine.go_on.clear()
        with contextlib.ExitStack() as stack:
            for number in range(40):
                send_question(stack.enter_context(connection_to(address)), stream=number % 2 == 0)
            wait_until(lambda: len(engine.seen) == 40, 60, "the engine works on all of them")
            assert doors.drain.running == 40
        wait_until(lambda: doors.drain.running == 0, 30, "nothing runs any more, though the engine has not answered")
        engine.go_on.set()
        assert ask(address).status_code == 200


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_clients_that_go_away_leave_nothing_behind(engine: LocalEngine, tmp_path: Path) -> None:
    """Before, during and after the first words of the answer, streamed or not, from a real vLLM."""
    draw = random.Random(0)
    long = {"model": "tiny", "max_tokens": 300, "ignore_eos": True, "temperature": 1.0, "n": 4}

    def come_and_go(number: int) -> None:
        with connection_to(address) as connection:
            send_question(connection, stream=number % 2 == 0, **long)
            time.sleep(draw.choice((0.0, 0.01, 0.1, 0.3)))

    model = str(engine.facts.folder)
    with gateway_process(engine, tmp_path, model, "--name", "tiny") as (process, address):
        memory = []
        for batch in range(10):
            with ThreadPoolExecutor(16) as pool:
                list(pool.map(come_and_go, range(100 * batch, 100 * batch + 100)))
            gone = time.monotonic()
            wait_until(lambda: running_requests(address) == 0, 60, "nothing runs, at the gateway and in vLLM")
            memory.append(psutil.Process(process.pid).memory_info().rss / 2**20)
            print(f"{100 * batch + 100} gone: idle after {time.monotonic() - gone:.1f} s, {memory[-1]:.0f} MiB")
        assert ask(address, model="tiny").status_code == 200
    assert max(memory[5:]) - memory[4] < 20, memory


def running_requests(address: str) -> float:
    """At the gateway, and in the vLLM behind it."""
    lines = httpx.get(f"{address}/metrics", timeout=30, trust_env=False).text.splitlines()
    names = ("kangaroo_running_requests", "vllm:num_requests_running", "vllm:num_requests_waiting")
    values = [float(line.rpartition(" ")[2]) for line in lines if line.startswith(names)]
    assert len(values) >= 3
    return sum(values)
