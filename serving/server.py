"""Run the gateway from start to end: Ctrl-C or SIGTERM lets running answers finish, a second Ctrl-C does not."""

import contextlib
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from assistant.models import ModelError
from serving.adapters import AdapterPlaces
from serving.admission import Drain
from serving.doors import Doors
from serving.engine import Engine, EngineError, Phase
from serving.gateway import create_gateway
from serving.jobs.data_folder import DataFolder
from serving.listening import ListenError, listen
from serving.model_folder import ModelFacts
from serving.patience import PatientProtocol
from serving.pictures import RemoteHosts

# For the pages' open connections, once the API's own requests are over.
SECONDS_FOR_PAGES = 2


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which ends only when `drain` says that nothing is left to finish."""

    def __init__(self, config: uvicorn.Config, drain: Drain) -> None:
        super().__init__(config)
        self.drain = drain

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the end, a second Ctrl-C is the end."""
        at_once = self.drain.has_begun and sig == signal.SIGINT
        super().handle_exit(sig, frame)  # it remembers the signal
        self.should_exit = self.force_exit = at_once
        if not self.drain.has_begun and self.drain.running:
            print(f"Finishing {self.drain.running} answers; Ctrl-C stops at once.", file=sys.stderr, flush=True)
        self.drain.begin()

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second by uvicorn; True ends the server."""
        self.should_exit = self.should_exit or self.drain.is_over()
        return await super().on_tick(counter)


def serve(
    engine: AbstractContextManager[Engine],
    facts: ModelFacts,
    model_name: str,
    host: str,
    port: int,
    *,
    doors: Doors | None = None,
    remote_hosts: RemoteHosts | None = None,
    data: DataFolder | None = None,
    adapters: AdapterPlaces | None = None,
    attach: Callable[[FastAPI], FastAPI] | None = None,
) -> int:
    """Start `engine` and serve until Ctrl-C or SIGTERM; the exit code.

    The gateway, with what `attach` mounts on it, is up at once while the engine loads behind it.
    """
    doors = doors or Doors(names=(host,))
    log_requests()
    try:
        with listen(host, port) as listener, engine as started:
            app = create_gateway(
                started, model_name, facts, doors=doors, remote_hosts=remote_hosts, data=data, adapters=adapters
            )
            print(f"Kangaroo is at http://{bracketed(host)}:{listener.getsockname()[1]}", flush=True)
            print(describe_doors(doors), flush=True)
            threading.Thread(target=tell_changes, args=[started], daemon=True).start()
            run(attach(app) if attach else app, listener, doors.drain)
    except (EngineError, ModelError, ListenError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def run(app: FastAPI, listener: socket.socket, drain: Drain) -> None:
    """Serve `app` until Ctrl-C or SIGTERM."""
    # uvicorn raises the signal that ended it once more. That is no error here, and must not stop the cleaning up.
    with contextlib.suppress(KeyboardInterrupt), _sigterm_as_interrupt():
        DrainingServer(uvicorn_config(app), drain).run(sockets=[listener])


def uvicorn_config(app: FastAPI) -> uvicorn.Config:
    """How uvicorn serves `app`: slow clients are dropped, and nothing speaks WebSocket here."""
    return uvicorn.Config(
        app,
        http=PatientProtocol,
        # uvloop, which uvicorn would take, ended a test run with a segmentation fault (docs/decisions.md).
        loop="asyncio",
        ws="none",
        log_level="warning",
        timeout_graceful_shutdown=SECONDS_FOR_PAGES,
        server_header=False,
    )


def bracketed(host: str) -> str:
    """An IPv6 address as it stands in a URL."""
    return f"[{host}]" if ":" in host else host


def describe_doors(doors: Doors) -> str:
    """Who may come in, for the person at the terminal."""
    if doors.keys is None:
        return "It asks for no key: whoever reaches the port may use it (`kangaroo key new NAME` changes that)."
    return f"It asks for a key of {doors.keys.file}."


def log_requests() -> None:
    """A line of JSON on standard error for each request of the API, and for what befalls keys and engine."""
    ours = logging.getLogger("kangaroo")
    if not ours.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
        ours.addHandler(handler)
    ours.setLevel(logging.INFO)


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def tell_changes(engine: Engine) -> None:
    """Tell the person at the terminal what the engine does, whenever that changes."""
    told = None
    while (state := engine.state()).phase is not Phase.STOPPED:
        if state != told:
            told = state
            print(f"Engine: {state.reason}", flush=True)
            if state.phase is Phase.DEAD:
                print(f"The engine stopped: {state.reason}\n{engine.log_tail()}", file=sys.stderr, flush=True)
        time.sleep(0.5)
