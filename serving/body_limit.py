"""Refuse request bodies that are too large or come too slowly, before anything reads them."""

import asyncio

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import ApiError, error_response
from serving.notes import note_of


class BodyLimit:
    """ASGI middleware for the API's routes; the pages beside them have limits of their own.

    Args:
        max_bytes: of a whole body.
        max_seconds: for a whole body to arrive.
        keep_body: for the log, where the person who runs the server asks for contents.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_seconds: float, keep_body: bool = False) -> None:
        self.app = app
        self.keep_body = keep_body
        self.max_bytes = max_bytes
        self.max_seconds = max_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
        except ApiError as error:
            headers = {"Connection": "close"}
            await error_response(error.status, str(error), headers=headers)(scope, receive, send)
            return
        if body is None:
            return
        note = note_of(HTTPConnection(scope))
        note.body_bytes, note.body = len(body), body if self.keep_body else None
        await self.app(scope, _replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None when the client went away."""
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.max_bytes:
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(self.max_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self.max_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError as error:
            raise ApiError(408, f"The body did not arrive within {self.max_seconds:g} s.") from error

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The body is over the limit of {self.max_bytes / 2**20:.3g} MiB.")


def _replay(body: bytes, receive: Receive) -> Receive:
    """Hand out the body that was read already, then whatever comes after it (the client's disconnect)."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay
