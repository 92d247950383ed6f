"""Start the engine again when it dies, later and later, and give up with the reason when that does not help."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from assistant.models import ModelError
from serving.engine import EngineError, EngineState, LocalEngine, Phase

log = logging.getLogger("kangaroo.engine")

SECONDS_BETWEEN_LOOKS = 0.2


class RestartingEngine:
    """A local engine that lives on: each time it dies, another one is started, at an address and with a key of its own.

    It starts again after `first_wait` seconds, twice as long after each further death, `longest_wait` at most. One
    that was ready for `steady_seconds` counts as well again. It is given up when it died `most_deaths` times without
    that, or when it has never been ready: a model that does not load does not load the second time either.
    """

    def __init__(
        self,
        new_engine: Callable[[], LocalEngine],
        *,
        first_wait: float = 1.0,
        longest_wait: float = 60.0,
        steady_seconds: float = 60.0,
        most_deaths: int = 5,
    ) -> None:
        """`new_engine` makes one that is not started. Raises what that raises."""
        self._new_engine = new_engine
        self._engine = new_engine()
        self._waits = (first_wait, longest_wait)
        self._steady_seconds = steady_seconds
        self._most_deaths = most_deaths
        self._was_ready = False
        self._deaths = 0  # without a steady life in between
        self._resting: EngineState | None = None  # what `state` says while no engine runs
        self._noticed = threading.Event()  # set as soon as that is known
        self._ending = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="engine watcher", daemon=True)
        self.restarts = 0

    @property
    def base_url(self) -> str:
        return self._engine.base_url

    @property
    def api_key(self) -> str | None:
        return self._engine.api_key

    @property
    def picture_folder(self) -> Path | None:
        return self._engine.picture_folder

    def is_ready(self) -> bool:
        return self._resting is None and self._engine.is_ready()

    def state(self) -> EngineState:
        """As of a `LocalEngine`; an engine that is to start again is loading, with the reason of its death told."""
        if (resting := self._resting) is not None:
            return resting
        state = self._engine.state()
        if state.phase is not Phase.DEAD:
            return state
        # The watcher has not looked yet, and it alone knows whether another one follows.
        self._noticed.wait(2 * SECONDS_BETWEEN_LOOKS)
        return self._resting or EngineState(Phase.LOADING, f"it ended ({state.reason})")

    def log_tail(self) -> str:
        return self._engine.log_tail()

    def __enter__(self) -> "RestartingEngine":
        self._engine.start()
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._watcher.join()
        self._engine.stop()
        self._resting = EngineState(Phase.STOPPED, "the engine was stopped")

    def _watch(self) -> None:
        ready_since: float | None = None
        while not self._ending.wait(SECONDS_BETWEEN_LOOKS):
            state = self._engine.state()
            if state.phase is Phase.READY:
                ready_since = ready_since or time.monotonic()
            elif state.phase is Phase.DEAD:
                # The engine's own word: it may have been ready, and dead, between two looks.
                self._was_ready = self._was_ready or self._engine.has_answered
                steady = ready_since is not None and time.monotonic() - ready_since >= self._steady_seconds
                self._deaths = 1 if steady else self._deaths + 1
                ready_since = None
                if not self._start_again(state.reason):
                    return

    def _start_again(self, reason: str) -> bool:
        """Wait and start another engine; False when there will be none."""
        if not self._was_ready or self._deaths >= self._most_deaths:
            times = "" if self._deaths == 1 else f" {self._deaths} times in a row, the last time"
            self._rest(EngineState(Phase.DEAD, f"it ended{times}: {reason}" if times else reason))
            log.error("The engine is given up: %s", self.state().reason)
            return False
        first, longest = self._waits
        seconds = min(longest, first * 2 ** (self._deaths - 1))
        self._rest(EngineState(Phase.LOADING, f"it ended ({reason}) and starts again in {seconds:g} s"))
        log.error("The engine ended: %s. It starts again in %g s.", reason, seconds)
        if self._ending.wait(seconds):
            return False
        self._engine.stop()  # takes what is left of the old one
        try:
            engine = self._new_engine()
        except (EngineError, ModelError) as error:
            self._rest(EngineState(Phase.DEAD, f"it ended ({reason}) and cannot start again: {error}"))
            log.error("The engine is given up: %s", self.state().reason)
            return False
        self._remove_log()
        self._engine = engine
        self._engine.start()
        self.restarts += 1
        self._noticed.clear()
        self._resting = None
        return True

    def _rest(self, state: EngineState) -> None:
        self._resting = state
        self._noticed.set()

    def _remove_log(self) -> None:
        """The old engine's log, but not that of the person who named one."""
        if self._engine.log_is_temporary:
            with contextlib.suppress(FileNotFoundError):
                self._engine.log_path.unlink()
