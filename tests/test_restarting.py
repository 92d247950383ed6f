"""An engine that dies is started again, later and later, and given up with the reason: small programs are engines."""

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from assistant.models import find_model
from serving.engine import LocalEngine, Phase
from serving.restarting import RestartingEngine
from tests.test_engine import living, wait_until

# Says that it is well for so many seconds, then dies of an error; without seconds it does so at once.
PROGRAM = """
import http.server, sys, threading, time
port, seconds = int(sys.argv[1]), float(sys.argv[2])
class Well(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
if seconds:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Well)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    time.sleep(seconds)
raise MemoryError("no room for the cache")
"""


class SmallProgram(LocalEngine):
    """A `LocalEngine` whose supervisor runs another program than vLLM."""

    def __init__(self, seconds: float, log_path: Path | None = None) -> None:
        super().__init__(find_model(None), "joey", log_path=log_path)
        self._command = [sys.executable, "-c", PROGRAM, str(self._port), str(seconds)]


def lives(*seconds: float) -> Callable[[], SmallProgram]:
    """Makes engines that live so long, one after the other, and the last of them for every further one."""
    left = list(seconds)
    return lambda: SmallProgram(left.pop(0) if len(left) > 1 else left[0])


def program_of(engine: RestartingEngine) -> psutil.Process:
    """The process that runs `PROGRAM`; its supervisor has it on its command line too."""
    port = engine.base_url.rpartition(":")[2]
    everybody = psutil.Process().children(recursive=True)
    [program] = [each for each in everybody if each.cmdline()[1:4] == ["-c", PROGRAM, port]]
    return program


def test_a_dead_engine_is_started_again_at_a_new_address_with_a_new_key() -> None:
    engine = RestartingEngine(lives(600), first_wait=0.5)
    with engine:
        wait_until(lambda: engine.state().phase is Phase.READY, 60, "ready")
        address, key, log = engine.base_url, engine.api_key, engine._engine.log_path
        program = program_of(engine)
        program.send_signal(signal.SIGKILL)
        wait_until(lambda: engine.state().phase is Phase.LOADING, 30, "its death is noticed")
        assert "killed by signal 9" in engine.state().reason
        assert "starts again in 0.5 s" in engine.state().reason
        wait_until(lambda: engine.state().phase is Phase.READY, 60, "ready again")
        assert engine.restarts == 1
        assert engine.base_url != address
        assert engine.api_key != key
        assert httpx.get(f"{engine.base_url}/health", trust_env=False).status_code == 200
        assert not log.exists(), "the dead one's log is cleaned up"
        program = program_of(engine)
        members = [program, program.parent()]
    assert engine.state().phase is Phase.STOPPED
    assert living([each for each in members if each is not None]) == []


def test_it_waits_longer_each_time_and_gives_up(caplog: pytest.LogCaptureFixture) -> None:
    with RestartingEngine(lives(6, 0), first_wait=0.2, most_deaths=4) as engine:
        wait_until(lambda: engine.state().phase is Phase.DEAD, 120, "given up")
        assert engine.restarts == 3
    told = [record.args for record in caplog.records if "starts again" in record.msg]
    waits = [arguments[1] for arguments in told if isinstance(arguments, tuple)]
    assert waits == [0.2, 0.4, 0.8]


def test_the_reason_of_giving_up_is_told() -> None:
    with RestartingEngine(lives(6, 0), first_wait=0.1, most_deaths=2) as engine:
        wait_until(lambda: engine.state().phase is Phase.DEAD, 60, "given up")
        assert engine.state().reason == "it ended 2 times in a row, the last time: MemoryError: no room for the cache"
        assert "no room for the cache" in engine.log_tail()


def test_one_that_was_never_ready_is_not_tried_again() -> None:
    with RestartingEngine(lives(0)) as engine:
        wait_until(lambda: engine.state().phase is Phase.DEAD, 60, "given up")
        assert engine.state().reason == "MemoryError: no room for the cache"
        assert engine.restarts == 0


def test_a_steady_life_begins_the_count_anew() -> None:
    """Each lives long enough to count as well, so it goes on beyond the number of deaths that would end it."""
    with RestartingEngine(lives(1.5), first_wait=0.1, steady_seconds=0.5, most_deaths=2) as engine:
        wait_until(lambda: engine.restarts >= 3, 120, "it goes on")
        assert engine.state().phase is not Phase.DEAD


def test_the_end_comes_at_once_while_it_waits() -> None:
    with RestartingEngine(lives(6, 600), first_wait=300, longest_wait=300) as engine:
        wait_until(lambda: "starts again in 300 s" in engine.state().reason, 60, "it waits")
        started = time.monotonic()
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGSEGV])
def test_any_end_of_the_program_is_a_death(number: signal.Signals) -> None:
    with RestartingEngine(lives(600), first_wait=0.1) as engine:
        wait_until(lambda: engine.state().phase is Phase.READY, 60, "ready")
        program = program_of(engine)
        program.send_signal(number)
        wait_until(lambda: engine.restarts == 1 and engine.state().phase is Phase.READY, 60, "ready again")
