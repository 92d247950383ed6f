"""Two vLLM engines behind one gateway, by vLLM's own data parallelism: one is killed under load, and all comes back."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from assistant.images import encode_data_url
from assistant.models import JOEY
from assistant.questions import CAPTION_QUESTION
from serving.engine import free_port
from serving.upstream import CUT_OFF, in_our_words
from tests.test_engine import family, living, wait_until
from training.data.scenes import EVALUATION_SEED, make_scene

SECONDS = 900.0  # two engines start on one core that others use too
WORKERS = 6
SCENES = 11  # an odd number: each is asked about as a stream and not
STOPPED = (
    "The engine stopped while it worked on this request.",
    "The engine stopped in the middle of the answer.",
    "The engine failed on this request.",
)


@dataclass(frozen=True)
class Attempt:
    """One request: the number of its scene, whether as a stream, when it was sent, and what came of it."""

    scene: int
    streamed: bool
    sent: float
    answer: str | None  # None where an error came in its place
    complaint: str = ""


@contextmanager
def two_engines(port: int, log: Path) -> Iterator[subprocess.Popen[str]]:
    """`kangaroo serve` with a vLLM of two engines, each with a cache of its own."""
    environment = os.environ | {
        "XDG_DATA_HOME": str(log.parent / "no-keys"),
        "OMP_NUM_THREADS": "1",
        # vLLM gives each engine a NUMA node of its own, and most machines have one.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    flags = "--data-parallel-size 2 --dtype float32 --max-num-seqs 16"
    command = [sys.executable, "-m", "ui.command_line", "serve", "--port", str(port), "--engine-args", flags]
    with (
        log.open("w") as out,
        subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT, text=True) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def engines_of(process: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    """The processes that hold an engine each, by the name that vLLM gives them."""
    found = {}
    for member in family(process):
        with suppress(psutil.NoSuchProcess):
            if name := re.match(r"VLLM::EngineCore_DP\d+", " ".join(member.cmdline())):
                found[name[0]] = member
    return found


def wait_for_engines(client: httpx.Client, log: Path) -> None:
    """Until vLLM answers; asked seldom, for it starts on the same cores."""
    deadline = time.monotonic() + SECONDS
    state = {"state": "loading", "reason": "the gateway does not listen yet"}
    while state["state"] != "ready":
        assert time.monotonic() < deadline and state["state"] == "loading", f"{state}\n{log.read_text()[-3000:]}"
        time.sleep(2)
        with suppress(httpx.TransportError):
            state = client.get("/health").json()["engine"]


def attempt(client: httpx.Client, scene: int, streamed: bool) -> Attempt:
    """Ask once. The gateway must answer in its own words whatever happens behind it."""
    picture = encode_data_url(make_scene(EVALUATION_SEED + scene).image)
    content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": CAPTION_QUESTION}]
    messages = [{"role": "user", "content": content}]
    body = {"model": JOEY.name, "messages": messages, "temperature": 0, "max_tokens": 60, "stream": streamed}
    sent = time.monotonic()
    answer = client.post("/v1/chat/completions", json=body)
    if answer.status_code != 200:
        assert answer.status_code == 503, answer.text
        assert int(answer.headers["Retry-After"]) > 0
        return Attempt(scene, streamed, sent, None, answer.json()["error"]["message"])
    if not streamed:
        return Attempt(scene, streamed, sent, answer.json()["choices"][0]["message"]["content"])
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    if "error" in events[-1]:
        return Attempt(scene, streamed, sent, None, events[-1]["error"]["message"])
    assert lines[-1] == "[DONE]", "neither an end nor an error"
    deltas = [event["choices"][0]["delta"] for event in events]
    return Attempt(scene, streamed, sent, "".join(delta.get("content") or "" for delta in deltas))


def answered(client: httpx.Client, scene: int, streamed: bool) -> list[Attempt]:
    """Ask until there is an answer, as clients do that heed `Retry-After`; the attempts that it took."""
    deadline = time.monotonic() + SECONDS
    attempts = [attempt(client, scene, streamed)]
    while attempts[-1].answer is None:
        assert time.monotonic() < deadline, attempts[-1].complaint
        time.sleep(5)  # what `Retry-After` says
        attempts.append(attempt(client, scene, streamed))
    return attempts


def answered_by_engine(client: httpx.Client) -> dict[str, int]:
    """How many requests each engine has finished since vLLM's start, by vLLM's own count."""
    counts: dict[str, int] = {}
    line = r'^vllm:request_success_total\{(?:.*,)?engine="(\d+)".*\} ([\d.]+)$'
    for engine, number in re.findall(line, client.get("/metrics").text, re.MULTILINE):
        counts[engine] = counts.get(engine, 0) + int(float(number))
    return counts


def test_a_failure_in_a_stream_is_told_in_our_words() -> None:
    """vLLM ends a stream whose engine died with an event of its own; a refusal in a stream passes as it is."""
    piece, done = (
        b'data: {"choices": [{"delta": {"content": "\\"error\\" \\"finish_reason\\":\\"abort\\""}}]}',
        b"data: [DONE]",
    )
    died = (
        b'data: {"error": {"message": "EngineCore failed, see /tmp/trace", "type": "InternalServerError", "code": 500}}'
    )
    refused = b'data: {"error": {"message": "too long", "type": "BadRequestError", "code": 400}}'
    aborted = b'data: {"choices":[{"index":0,"delta":{"content":""},"finish_reason":"abort"}]}'
    assert in_our_words(b"\n\n".join([piece, aborted, done, b""])) == b"\n\n".join([piece, CUT_OFF, done, b""])
    told = in_our_words(b"\n\n".join([piece, died, done, b""]))
    assert told == b"\n\n".join([piece, CUT_OFF, done, b""]) and b"/tmp" not in told
    for events in (b"\n\n".join([piece, refused, done, b""]), b"\n\n".join([piece, done, b""])):
        assert in_our_words(events) == events
    assert json.loads(CUT_OFF.removeprefix(b"data: "))["error"]["message"] in STOPPED


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_killed_engine_costs_what_was_in_flight_and_nothing_else(tmp_path: Path) -> None:
    """Every scene is told of in the end, word by word as before; what failed ran at that moment, or came too early."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    log = tmp_path / "log"
    with (
        two_engines(port, log) as process,
        httpx.Client(base_url=address, timeout=SECONDS, trust_env=False) as client,
        ThreadPoolExecutor(WORKERS) as pool,
    ):
        wait_for_engines(client, log)
        before = engines_of(process)
        assert sorted(before) == ["VLLM::EngineCore_DP0", "VLLM::EngineCore_DP1"]
        expected = [attempt(client, scene, False).answer for scene in range(SCENES)]
        assert len(set(expected)) > 1, "the model answers everything alike; nothing could be told apart"

        running = [pool.submit(answered, client, number % SCENES, bool(number % 2)) for number in range(10 * SCENES)]
        wait_until(lambda: sum(each.done() for each in running) >= 2 * WORKERS, SECONDS, "the load runs")
        shares = answered_by_engine(client)
        before["VLLM::EngineCore_DP1"].send_signal(signal.SIGKILL)
        at = time.monotonic()
        assert not all(each.done() for each in running), "the load was over before the kill"
        outcomes = [each.result() for each in running]

        assert set(shares) == {"0", "1"} and min(shares.values()) > 0, f"one engine did all: {shares}"
        lost = [each for attempts in outcomes for each in attempts if each.answer is None]
        in_flight = [each for each in lost if each.sent < at]
        assert 1 <= len(in_flight) <= WORKERS
        assert {each.complaint for each in in_flight} <= set(STOPPED)
        assert [attempts[-1].answer for attempts in outcomes] == expected * 10
        after = engines_of(process)
        assert sorted(after) == sorted(before)
        assert not living([*before.values()]), "nothing of the old vLLM is left"
        assert "kangaroo_engine_restarts 1.0" in client.get("/metrics").text
        print(f"\n{len(outcomes)} scenes, shares {shares}; {len(in_flight)} in flight failed, {len(lost)} in all")
        for complaint in sorted({each.complaint for each in lost}):
            print(f"  {sum(each.complaint == complaint for each in lost)} times: {complaint}")

        members = family(process)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130
        wait_until(lambda: not living(members), 30, "all of vLLM has ended")
