"""Start vLLM as a program of its own, say how it does, and stop it with everything it started."""

import importlib.util
import os
import secrets
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import anyio
import httpx

from serving.engine_pictures import new_picture_folder
from serving.model_folder import read_model_folder
from serving.supervisor import supervised
from serving.vllm_program import (
    Dtype,
    adapter_flags,
    death_reason,
    loading_stage,
    vllm_command,
    vllm_environment,
)

SECONDS_BETWEEN_LOOKS = 1.0


class EngineError(RuntimeError):
    """The engine cannot be started; the message says why and what to do."""


class Phase(StrEnum):
    LOADING = "loading"
    READY = "ready"
    DEAD = "dead"
    STOPPED = "stopped"


@dataclass(frozen=True)
class EngineState:
    """How the engine does. `reason` is for people: the stage while it loads, the cause when it is dead."""

    phase: Phase
    reason: str


class Engine(Protocol):
    """Where requests go: an OpenAI-compatible server with its key, both anew after a restart.

    In `picture_folder`, anew too, it reads pictures of ours; None where it reads none. `state` may wait for a second at
    most.
    """

    @property
    def base_url(self) -> str: ...

    @property
    def api_key(self) -> str | None: ...

    @property
    def restarts(self) -> int: ...

    @property
    def picture_folder(self) -> Path | None: ...

    def is_ready(self) -> bool:
        """Whether it is known to be. Waits for nobody, so that it may be asked between two events of other answers."""

    def state(self) -> EngineState: ...

    def log_tail(self) -> str: ...


async def state_of(engine: Engine) -> EngineState:
    """How the engine does, asked so that no other request waits meanwhile."""
    if engine.is_ready():
        return EngineState(Phase.READY, "ready")
    return await anyio.to_thread.run_sync(engine.state)


class RemoteEngine:
    """An engine that somebody else started, on this machine or another.

    With `model_name` it must serve a model of that name. How it does is asked once a second at most. `restarts` counts
    how often it came back after it had been away: what was loaded into it may be gone.
    """

    picture_folder: Path | None = None

    def __init__(self, base_url: str, api_key: str | None = None, model_name: str | None = None) -> None:
        self.base_url = base_url.rstrip("/")
        self.api_key = api_key
        self._model_name = model_name
        self._known: tuple[float, str, EngineState] | None = None
        self._was_ready = self._went_away = False
        self.restarts = 0

    def is_ready(self) -> bool:
        if self._known is None or self._known[1] != self.base_url:
            return False
        return time.monotonic() - self._known[0] < SECONDS_BETWEEN_LOOKS and self._known[2].phase is Phase.READY

    def state(self) -> EngineState:
        now = time.monotonic()
        if self._known is None or now - self._known[0] >= SECONDS_BETWEEN_LOOKS or self._known[1] != self.base_url:
            self._known = (now, self.base_url, self._look())
            is_ready = self._known[2].phase is Phase.READY
            self.restarts += is_ready and self._went_away
            self._was_ready = self._was_ready or is_ready
            self._went_away = self._was_ready and not is_ready
        return self._known[2]

    def log_tail(self) -> str:
        return "(its log is where it runs)"

    def __enter__(self) -> "RemoteEngine":
        return self

    def __exit__(self, *_: object) -> None:
        """It goes on: somebody else started it."""

    def _look(self) -> EngineState:
        if not answers(self.base_url):
            return EngineState(Phase.LOADING, f"waiting for the engine at {self.base_url}")
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        try:
            answer = look_at(f"{self.base_url}/v1/models", headers)
            names = [str(model["id"]) for model in answer.json()["data"]] if answer.status_code == 200 else []
        except (httpx.TransportError, ValueError, KeyError, TypeError):
            return EngineState(Phase.LOADING, f"the engine at {self.base_url} does not list its models")
        if answer.status_code in (401, 403):
            return EngineState(Phase.LOADING, f"the engine at {self.base_url} refuses our key (--engine-key-env)")
        if self._model_name is not None and self._model_name not in names:
            serves = ", ".join(names) or "nothing"
            return EngineState(Phase.LOADING, f"the engine at {self.base_url} serves {serves}, not {self._model_name}")
        return EngineState(Phase.READY, "ready")


class LocalEngine:
    """A vLLM of our own, alive from `start` until `stop`, or until this process ends in whatever way.

    Args:
        model_folder: a checkpoint in the published layout (safetensors, processor, `config.json`).
        model_name: the name it answers to.
        dtype: of weights and arithmetic.
        most_pictures: pictures in one request.
        most_pixels: pixels in one picture; vLLM's own limit of 179 million is no limit.
        log_path: where vLLM's output goes; a new temporary file by default.
        takes_adapters: whether adapters can be loaded while it runs, which costs memory, and speed where one is asked.
        more_arguments: further flags for vLLM (`serving.engine_arguments` says which are none).

    Raises:
        EngineError: vLLM is not installed.
        ModelError: a file is missing in the folder.
    """

    restarts = 0  # `serving.restarting` starts another one
    picture_folder: Path | None = None  # from `start` until the supervisor, which removes it, ends

    def __init__(
        self,
        model_folder: Path,
        model_name: str,
        *,
        dtype: Dtype = "bfloat16",
        most_pictures: int = 8,
        most_pixels: int = 20_000_000,
        log_path: Path | None = None,
        takes_adapters: bool = False,
        more_arguments: Sequence[str] = (),
    ) -> None:
        check_vllm_is_installed()
        self.facts = read_model_folder(model_folder)
        self.model_name = model_name
        self.log_is_temporary = log_path is None
        self.log_path = log_path or _new_log_file()
        # A key of this start alone: other users of the machine can reach the port, and must not use the engine.
        self.api_key: str | None = secrets.token_urlsafe(32)
        self._port = free_port()
        self.base_url = f"http://127.0.0.1:{self._port}"
        self._command = vllm_command(self.facts, model_name, self._port, dtype, most_pictures)
        self._environment = vllm_environment(self.api_key, most_pixels)
        if takes_adapters:
            self._command += adapter_flags()
            # vLLM warns of it: whoever reaches the port could load what they like. Here they would need the key.
            self._environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        self._command += more_arguments
        self._supervisor: subprocess.Popen[bytes] | None = None
        self.has_answered = False  # whether anybody has ever seen it ready
        self._is_stopped = False

    def start(self) -> None:
        """Start vLLM and return at once; `state` says how far it is."""
        self.picture_folder = new_picture_folder()
        reads = [] if self.picture_folder is None else ["--allowed-local-media-path", str(self.picture_folder)]
        with self.log_path.open("ab") as log:
            self._supervisor = subprocess.Popen(
                [*supervised(self.picture_folder), *self._command, *reads],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=self._environment,
                # The terminal's Ctrl-C reaches this process alone, which then stops the engine in order.
                start_new_session=True,
            )

    def stop(self) -> None:
        """End vLLM and all its children. It is no error if it has ended already."""
        self._is_stopped = True
        if self._supervisor is None or self._supervisor.stdin is None:
            return
        # The same path as when this process is killed: the pipe closes, and the supervisor cleans up.
        self._supervisor.stdin.close()
        self._supervisor.wait()

    def __enter__(self) -> "LocalEngine":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def is_ready(self) -> bool:
        lives = self._supervisor is not None and self._supervisor.poll() is None
        return lives and self.has_answered and not self._is_stopped

    def state(self) -> EngineState:
        if self._is_stopped:
            return EngineState(Phase.STOPPED, "the engine was stopped")
        if self._supervisor is None:
            return EngineState(Phase.LOADING, "not started yet")
        code = self._supervisor.poll()
        if code is not None:
            return EngineState(Phase.DEAD, death_reason(code, self.log()))
        self.has_answered = self.has_answered or answers(self.base_url)
        if self.has_answered:
            return EngineState(Phase.READY, "ready")
        return EngineState(Phase.LOADING, loading_stage(self.log()))

    def wait_until_ready(self, seconds: float) -> None:
        """Return when the engine answers.

        Raises:
            EngineError: it died (with the cause), or the time is over (with the stage it is in).
        """
        deadline = time.monotonic() + seconds
        while (state := self.state()).phase is not Phase.READY:
            if state.phase is not Phase.LOADING:
                raise EngineError(f"The engine stopped: {state.reason}\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise EngineError(f"The engine was not ready in {seconds:.0f} s: {state.reason}.\n{self.log_tail()}")
            time.sleep(0.2)

    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def log_tail(self, lines: int = 20) -> str:
        """The end of vLLM's log, for the person who runs the server; it may hold paths."""
        return "\n".join([f"(from {self.log_path})", *self.log().splitlines()[-lines:]])


def check_vllm_is_installed() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise EngineError(
            "vLLM is not installed. Install it with `uv sync --extra cuda` (an NVIDIA GPU) or `uv sync --extra cpu`."
        )


def free_port() -> int:
    """A port that is free now. vLLM takes it early in its start; if somebody was faster, its log says so."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(base_url: str) -> bool:
    """Whether the engine's health check passes."""
    try:
        return look_at(f"{base_url}/health").status_code == 200
    except httpx.TransportError:
        return False


def look_at(url: str, headers: Mapping[str, str] | None = None) -> httpx.Response:
    """What is there, within half a second. Raises httpx.TransportError."""
    # A TLS context costs 24 ms of the cores that the engine runs on; without TLS there is nothing to verify.
    verify = not url.startswith("http://")
    return httpx.get(url, headers=headers, timeout=0.5, trust_env=False, verify=verify)


def _new_log_file() -> Path:
    handle, name = tempfile.mkstemp(prefix="kangaroo-engine-", suffix=".log")
    os.close(handle)
    return Path(name)
