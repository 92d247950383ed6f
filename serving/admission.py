"""Let requests of the API in while there is room and the server goes on; let those inside finish before it ends."""

import time
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from serving.errors import error_response

SECONDS_TO_TRY_AGAIN = 5


class Drain:
    """Whether the server is ending, and how many requests of the API still run."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`seconds` is how long running requests may take once the end has begun."""
        self.seconds = seconds
        self.running = 0
        self._clock = clock
        self._began: float | None = None

    @property
    def has_begun(self) -> bool:
        return self._began is not None

    def begin(self) -> None:
        """From now on nothing is let in."""
        self._began = self._began if self._began is not None else self._clock()

    def is_over(self) -> bool:
        """Whether the server may end: all have finished, or the time for it is over."""
        if self._began is None:
            return False
        return self.running == 0 or self._clock() - self._began >= self.seconds


class Admission:
    """ASGI middleware for the API's routes.

    Args:
        drain: is told of requests that begin and end.
        most_running: requests at a time; each may hold a whole body and its pictures in memory.
    """

    def __init__(self, app: ASGIApp, drain: Drain, most_running: int) -> None:
        self.app = app
        self.drain = drain
        self.most_running = most_running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        if self.drain.has_begun:
            await _refuse("The server is stopping.", "stopping", {"Connection": "close"})(scope, receive, send)
            return
        if self.drain.running >= self.most_running:
            await _refuse(f"The server works on {self.most_running} requests.", "busy", {})(scope, receive, send)
            return
        self.drain.running += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.drain.running -= 1


def _refuse(message: str, code: str, headers: dict[str, str]) -> ASGIApp:
    headers = headers | {"Retry-After": str(SECONDS_TO_TRY_AGAIN)}
    return error_response(503, f"{message} Try again in a moment.", code=code, headers=headers)
