"""Answer no page of another origin, and no name that was made to point here, unless they were allowed."""

import ipaddress
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.errors import error_response


class OriginError(ValueError):
    """What was given to be allowed is no origin."""


class SameOrigin:
    """ASGI middleware.

    A page of anywhere may make its visitor's browser send requests here; such a request bears the page's `Origin`.
    A page that first makes its own name point here (DNS rebinding) is of our origin for the browser, but the `Host`
    it asks for is its name: so a host is an address, a name of this machine, or that of an allowed origin.
    """

    def __init__(self, app: ASGIApp, allowed: Iterable[str] = (), names: Iterable[str] = ()) -> None:
        """`allowed` are other origins (`checked_origin`), `names` other names of this machine."""
        self.app = app
        self.allowed = frozenset(allowed)
        own = {"localhost", socket.gethostname().lower(), *(name.lower() for name in names)}
        self.names = own | {urlsplit(origin).hostname or "" for origin in self.allowed}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not (wrong := self._wrong(scope)):
            await self.app(scope, receive, send)
            return
        await error_response(403, wrong, code="origin_not_allowed")(scope, receive, send)

    def _wrong(self, scope: Scope) -> str | None:
        headers = HTTPConnection(scope).headers
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_ours(host):
            return "This server does not go by the name in Host. Start it with --allow-origin to allow it."
        if origin is None or origin in self.allowed:
            return None
        if urlsplit(origin).scheme in ("http", "https") and origin.partition("://")[2].lower() == host.lower():
            return None
        return "Pages of other origins may not use this server. Start it with --allow-origin to allow one."

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self.names or is_address(name)


def is_address(name: str) -> bool:
    """Whether this is an IP address and not a name."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def checked_origin(text: str) -> str:
    """The origin `https://host[:port]` as browsers write it.

    Raises:
        OriginError: it is none.
    """
    try:
        parts = urlsplit(text.rstrip("/"))
        valid = parts.scheme in ("http", "https") and parts.hostname and not parts.path and not parts.query
        _ = parts.port
    except ValueError:
        valid = False
    if not valid:
        raise OriginError(f"{text!r} is no origin: write https://host or https://host:port.")
    return text.rstrip("/").lower()
