"""Ask for a key on every route but `/health`, and hold each key to its limits."""

import base64
import binascii
from functools import partial

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import ApiError, error_response
from serving.keys import Key, KeyRing
from serving.notes import Note, note_of
from serving.quotas import Quotas

OPEN_PATHS = ("/health",)


class Access:
    """ASGI middleware. Programs send `Authorization: Bearer KEY`; a browser asks its person (HTTP's Basic scheme).

    The page is open to whoever has a key, and asks the API in that person's name, so limits hold there too. They count
    what is asked or changed; looking (GET) is free, or a client that waits for a job would use its minute up.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, quotas: Quotas) -> None:
        self.app = app
        self.keys = keys
        self.quotas = quotas

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        note = note_of(HTTPConnection(scope))
        try:
            note.key = self._key(scope)
        except ApiError as error:
            scheme = "Bearer" if scope["path"].startswith("/v1/") else 'Basic realm="Kangaroo", charset="UTF-8"'
            headers = {"WWW-Authenticate": scheme}
            await error_response(error.status, str(error), code=error.code, headers=headers)(scope, receive, send)
            return
        if scope["path"].startswith("/v1/") and scope["method"] not in ("GET", "HEAD"):
            await self._within_limits(note, note.key, scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _key(self, scope: Scope) -> Key:
        text = presented_key(HTTPConnection(scope).headers.get("authorization"))
        if text is None:
            message = (
                "You did not send a key. Send one in the header Authorization: Bearer KEY; "
                "in a browser, type any user name and the key as the password."
            )
            raise ApiError(401, message, code="invalid_api_key")
        key = self.keys.find(text)
        if key is None:
            raise ApiError(401, "The key is not one of this server's.", code="invalid_api_key")
        return key

    async def _within_limits(self, note: Note, key: Key, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self.quotas.headers(key).items():
                    headers[name] = value
            await send(message)

        try:
            self.quotas.enter(key)
        except ApiError as error:
            refusal = error_response(error.status, str(error), code=error.code, headers=error.headers)
            await refusal(scope, receive, send_with_limits)
            return
        note.charge_pictures = partial(self.quotas.take_pictures, key)
        try:
            await self.app(scope, receive, send_with_limits)
        finally:
            self.quotas.leave(key)
            self.quotas.add_tokens(key, note.prompt_tokens + note.completion_tokens)


def presented_key(authorization: str | None) -> str | None:
    """The key in an Authorization header: after `Bearer`, or the password after `Basic`."""
    scheme, _, rest = (authorization or "").partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip() or None
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(rest, validate=True).decode().partition(":")[2] or None
        except (binascii.Error, UnicodeDecodeError):
            return None
    return None
