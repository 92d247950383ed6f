"""Refuse request bodies that are too large or come too slowly, before anything reads them."""

import asyncio
import time
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import ApiError, error_response
from serving.notes import note_of

SECONDS_TO_TRY_AGAIN = 5
CLOSE = {"Connection": "close"}


@dataclass(frozen=True)
class UploadLimit:
    """Of bodies that are written to the disk as they come. `slowest` is bytes a second, on the mean, of a client."""

    path: str = "/v1/files"
    max_bytes: int = 256 * 2**20
    slowest: int = 128 * 2**10
    at_once: int = 4  # each lies on the disk twice for a moment


UPLOADS = UploadLimit()


class BodyLimit:
    """ASGI middleware for the API's routes; the pages beside them have limits of their own.

    A body is read whole before the route is asked, but for uploads, which are longer.

    Args:
        max_bytes: of a whole body.
        max_seconds: for a whole body to arrive.
        keep_body: for the log, where the person who runs the server asks for contents; uploads are not.
        uploads: what holds for them instead.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int,
        max_seconds: float,
        keep_body: bool = False,
        uploads: UploadLimit = UPLOADS,
    ) -> None:
        self.app = app
        self.uploads = uploads
        self._uploading = 0
        self.keep_body = keep_body
        self.max_bytes = max_bytes
        self.max_seconds = max_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        if scope["path"] == self.uploads.path and scope["method"] == "POST":
            await self._upload(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
        except ApiError as error:
            await error_response(error.status, str(error), headers=CLOSE)(scope, receive, send)
            return
        if body is None:
            return
        note = note_of(HTTPConnection(scope))
        note.body_bytes, note.body = len(body), body if self.keep_body else None
        await self.app(scope, _replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None when the client went away."""
        if declared_length(scope) > self.max_bytes:
            raise ApiError(413, too_large(self.max_bytes))
        body = bytearray()
        try:
            async with asyncio.timeout(self.max_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self.max_bytes:
                        raise ApiError(413, too_large(self.max_bytes))
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError as error:
            raise ApiError(408, f"The body did not arrive within {self.max_seconds:g} s.") from error

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._uploading >= self.uploads.at_once:
            headers = CLOSE | {"Retry-After": str(SECONDS_TO_TRY_AGAIN)}
            message = f"{self.uploads.at_once} files are being uploaded already. Try again in a moment."
            await error_response(503, message, code="busy", headers=headers)(scope, receive, send)
            return
        if declared_length(scope) > self.uploads.max_bytes:
            await error_response(413, too_large(self.uploads.max_bytes), headers=CLOSE)(scope, receive, send)
            return
        self._uploading += 1
        try:
            await self.app(scope, self._counted(scope, receive), send)
        finally:
            self._uploading -= 1

    def _counted(self, scope: Scope, receive: Receive) -> Receive:
        """The pieces of an upload as they come, until they are too many or too slow."""
        note, began, arrived = note_of(HTTPConnection(scope)), time.monotonic(), False

        async def counted() -> Message:
            nonlocal arrived
            if arrived:  # what is still to come is the client's disconnect, which may take its time
                return await receive()
            seconds = self.max_seconds + note.body_bytes / self.uploads.slowest - (time.monotonic() - began)
            try:
                message = await asyncio.wait_for(receive(), max(0.0, seconds))
            except TimeoutError as error:
                raise HTTPException(408, "The file came too slowly.", CLOSE) from error
            note.body_bytes += len(message.get("body", b""))
            if note.body_bytes > self.uploads.max_bytes:
                raise HTTPException(413, too_large(self.uploads.max_bytes), CLOSE)
            arrived = not message.get("more_body", False)
            return message

        return counted


def declared_length(scope: Scope) -> int:
    """What the client says that its body is long; 0 where it does not."""
    declared = dict(scope["headers"]).get(b"content-length", b"0")
    return int(declared) if declared.isdigit() else 0


def too_large(limit: int) -> str:
    """That a body is over `limit` bytes, in words."""
    return f"The body is over the limit of {limit / 2**20:.3g} MiB."


def _replay(body: bytes, receive: Receive) -> Receive:
    """Hand out the body that was read already, then whatever comes after it (the client's disconnect)."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay
