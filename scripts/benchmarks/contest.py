"""Let several trainers take turns, a step each, so that what else the machine does hits all alike."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import TrainerCallback


class Contest:
    """Trainers that take turns, a step each, and the seconds and the loss of every step.

    The first trains in this thread, where signals arrive; the others in threads of their own. One works at a time.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.seconds: dict[str, list[float]] = {name: [] for name in names}
        self._turn = threading.Condition()
        self._whose, self._playing = 0, list(names)

    def run(self, works: Mapping[str, Callable[[], Any]]) -> None:
        """Let all train to their ends. Raises what one of them raised."""
        with ThreadPoolExecutor() as pool:
            others = [pool.submit(self._work, name, works[name]) for name in self.names[1:]]
            self._work(self.names[0], works[self.names[0]])
            for other in others:
                other.result()

    def _work(self, name: str, work: Callable[[], Any]) -> None:
        self.wait(name)
        try:
            work()
        finally:
            with self._turn:
                place = self._playing.index(name)
                self._playing.remove(name)
                self._whose = place % max(1, len(self._playing))
                self._turn.notify_all()

    def wait(self, name: str) -> None:
        """Return when it is the turn of `name`."""
        with self._turn:
            self._turn.wait_for(lambda: self._playing[self._whose % len(self._playing)] == name)

    def hand_on(self, name: str) -> None:
        """End the turn of `name`, and return when it comes again."""
        with self._turn:
            self._whose = (self._playing.index(name) + 1) % len(self._playing)
            self._turn.notify_all()
        self.wait(name)


class TakesTurns(TrainerCallback):
    """Measures each step, data included, and hands on after it."""

    def __init__(self, contest: Contest, name: str) -> None:
        self.contest, self.name, self.start = contest, name, 0.0

    def on_train_begin(self, *arguments: Any, **named: Any) -> None:
        """The first step begins."""
        self.start = time.perf_counter()

    def on_step_end(self, *arguments: Any, **named: Any) -> None:
        """A step is done."""
        self.contest.seconds[self.name].append(time.perf_counter() - self.start)
        self.contest.hand_on(self.name)
        self.start = time.perf_counter()
