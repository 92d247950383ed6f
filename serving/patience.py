"""Drop connections that hold a place and do nothing: request heads that never end, answers that are never read."""

import asyncio

from uvicorn.protocols.http.auto import AutoHTTPProtocol

SECONDS_FOR_A_HEAD = 8.0
SECONDS_FOR_A_READER = 30.0


class PatientProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's own protocol with two clocks, which uvicorn does not have.

    The first runs while a request's head is awaited, be it the first of a connection or a later one; a whole body has
    a limit of its own (`serving.body_limit`), and a connection between two requests has uvicorn's. The second runs
    while the client's side of the connection is full, that is, while it reads nothing of what it asked for.
    """

    _head_clock: asyncio.TimerHandle | None = None
    _reader_clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        answered = self.cycle
        super().data_received(data)
        if self.cycle is not answered:
            self._stop_head_clock()
        elif self._head_clock is None and (self.cycle is None or self.cycle.response_complete):
            self._await_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reader_clock = self.loop.call_later(SECONDS_FOR_A_READER, self._drop)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reader_clock is not None:
            self._reader_clock.cancel()
            self._reader_clock = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_head_clock()
        if self._reader_clock is not None:
            self._reader_clock.cancel()

    def _await_head(self) -> None:
        self._head_clock = self.loop.call_later(SECONDS_FOR_A_HEAD, self._drop)

    def _stop_head_clock(self) -> None:
        if self._head_clock is not None:
            self._head_clock.cancel()
            self._head_clock = None

    def _drop(self) -> None:
        # No farewell: whoever sends no head, or reads no answer, would not read that either.
        self.transport.abort()
