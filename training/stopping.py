"""Stop a run when a person or the machine asks for it: the step is finished, a checkpoint is saved, then it ends."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_REQUEST = 2.0  # seconds in which a second signal is the first one again: torchrun passes Ctrl-C on to its own
HEARD = b"\nfinishing this step, then saving. Ctrl-C again, two seconds from now, stops without saving\n"


class StopRequest:
    """While it is entered, Ctrl-C or a termination sets `made`; two seconds later another one ends the run at once.

    Outside the main thread, which gets no signals, nothing is ever requested. Processes that were forked meanwhile, as
    those that read pictures ahead are, get Ctrl-C too and leave it to this one.
    """

    def __init__(self) -> None:
        self.made = False
        self._process = os.getpid()
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return
        if self.made and time.monotonic() - self._since > SAME_REQUEST:
            raise KeyboardInterrupt
        if not self.made:
            self.made, self._since = True, time.monotonic()
            os.write(2, HEARD)  # print may be at work in the very line that the signal came in
