"""Pass a request on to the engine and its answer back, and let go of the engine when the client has gone."""

import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from typing import Any

import aiohttp
import anyio
import httpx
from fastapi import Request
from pydantic import TypeAdapter
from starlette.background import BackgroundTask
from starlette.responses import Response, StreamingResponse

from serving.engine import Engine
from serving.errors import ApiError, error_object, error_response
from serving.notes import Note, note_of
from serving.seen_pictures import SeenPictures
from serving.stream_pace import StreamPace

SECONDS_TO_CONNECT = 5.0
SECONDS_FOR_NUMBERS = 5.0
PATIENT = aiohttp.ClientTimeout(total=None, sock_connect=SECONDS_TO_CONNECT)  # a long answer is no fault
SECONDS_KEPT_OPEN = 3.0  # vLLM closes a connection that nobody uses for five, and would miss what is sent just then
TRY_AGAIN = {"Retry-After": "5"}
CHAT = "/v1/chat/completions"
FAILURE = b'data: {"error"'  # how an event begins by which vLLM ends a stream that failed
# vLLM ends what an engine works on when it is told to stop (as the others are when one of several dies), and calls the
# half answer good. In the text of an answer the quotes would be escaped.
ABORTED = b'"finish_reason":"abort"'
ENDED = re.compile(rb'"finish_reason": ?"')
DONE = b"data: [DONE]"
STOPPED = "The engine stopped while it worked on this request."
CUT_OFF = b"data: " + json.dumps(error_object(503, "The engine stopped in the middle of the answer.")).encode()
JSON = TypeAdapter(dict[str, Any])


class EngineGone(RuntimeError):
    """The engine did not answer."""


class EngineRefusal(RuntimeError):
    """The engine answered no; the message is its own where it has one."""

    def __init__(self, status: int, said: str | None) -> None:
        super().__init__(said or f"the engine answers {status}")
        self.status = status


class Upstream:
    """One pool of connections to the engine, for all requests.

    There is no limit of time on answers: a long one is no fault. A client that goes away ends the engine's work on it.
    """

    def __init__(self, engine: Engine) -> None:
        """`engine` may change its address and its key when it starts anew."""
        self._engine = engine
        self._seen = SeenPictures()
        self._pace = StreamPace()
        self._opened: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._opened is not None:
            await self._opened.close()

    async def get(self, path: str) -> bytes:
        """What the engine has at `path`. Raises EngineGone where it does not answer well."""
        try:
            async with await self._ask("GET", path, timeout=aiohttp.ClientTimeout(SECONDS_FOR_NUMBERS)) as answer:
                if answer.status != 200:
                    raise EngineGone(f"The engine answers {path} with {answer.status}.")
                return await answer.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise EngineGone(f"The engine does not answer {path}.") from error

    async def models(self) -> list[dict[str, Any]]:
        """What the engine says that it serves. Raises EngineGone where it does not answer well."""
        try:
            return list(json.loads(await self.get("/v1/models"))["data"])
        except (ValueError, KeyError, TypeError) as error:
            raise EngineGone("The engine does not list its models.") from error

    async def tell(self, path: str, body: dict[str, Any]) -> None:
        """Have the engine do something that no client asked for. Raises EngineGone and EngineRefusal."""
        try:
            async with await self._ask("POST", path, body) as answer:
                said = await answer.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise EngineGone(f"The engine does not answer {path}.") from error
        if answer.status != 200:
            raise EngineRefusal(answer.status, (_error_in(said) or {}).get("message"))

    async def post(self, request: Request, path: str, body: dict[str, Any]) -> Response:
        """Send `body` to the engine and relay what comes back, streamed when the engine streams it."""
        return await unless_gone(request, partial(self._send, path, body, note_of(request)))

    async def ask(self, path: str, body: dict[str, Any], note: Note) -> dict[str, Any]:
        """The engine's whole answer to `body`, which streams nothing. Raises ApiError with the engine's refusal."""
        answer = await self._send(path, body, note)
        content = json.loads(bytes(answer.body))
        if answer.status_code == 200:
            return dict(content)
        error = content["error"]
        again = int(answer.headers.get("retry-after", 0))
        raise ApiError(answer.status_code, error["message"], param=error["param"], retry_after=again)

    async def _answer(self, path: str, body: dict[str, Any]) -> aiohttp.ClientResponse:
        """The engine's answer; pictures that it has seen are sent only if it has forgotten them.

        Raises aiohttp.ClientError and TimeoutError.
        """
        if (short := self._seen.shortened(body)) is not None:
            answer = await self._ask_again(path, short)
            if answer.status == 200:
                self._seen.remember(body)
                return answer
            answer.close()
            self._seen.forget(body)
        answer = await self._ask_again(path, body)
        if answer.status == 500:
            # vLLM loses the picture of a request whose client went away, and fails the next request that shows it
            # so that it is sent again (in its log: "P0/P1 cache drift").
            answer.close()
            answer = await self._ask("POST", path, body)
        if answer.status == 200:
            self._seen.remember(body)
        return answer

    async def _ask_again(self, path: str, body: dict[str, Any]) -> aiohttp.ClientResponse:
        """As `_ask`; a connection that ends before there is any answer is no answer, and the next one may be well.

        vLLM closes connections that nobody used for a while, and one may be taken in that very moment. Raises
        aiohttp.ClientError and TimeoutError, in the first place where nobody listens any more.
        """
        try:
            return await self._ask("POST", path, body)
        except aiohttp.ClientConnectorError:
            raise
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            return await self._ask("POST", path, body)

    async def _ask(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        timeout: aiohttp.ClientTimeout = PATIENT,
    ) -> aiohttp.ClientResponse:
        """The engine's answer, of which only the head has come. Raises aiohttp.ClientError and TimeoutError."""
        headers = {"Authorization": f"Bearer {self._engine.api_key}"} if self._engine.api_key else {}
        content = None
        if body is not None:
            # A third of the time that Python's own json takes, which counts where pictures are megabytes of base64.
            content = JSON.dump_json(body)
            headers |= {"Content-Type": "application/json"}
        url = self._engine.base_url + path
        # A redirect is no answer, and could lead the key elsewhere.
        how: dict[str, Any] = {"headers": headers, "timeout": timeout, "allow_redirects": False}
        return await self._session().request(method, url, data=content, **how)

    def _session(self) -> aiohttp.ClientSession:
        """The pool, which belongs to the event loop that runs when it is first needed."""
        if self._opened is None:
            # aiohttp reads an event in a quarter of httpx's time, and there is one for each token. It takes no proxy
            # from the environment, which is not for a neighbour and would see the key.
            # Certificates are those that `serving.engine` trusts when it looks at the engine.
            trusted = httpx.create_ssl_context(trust_env=False)
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=SECONDS_KEPT_OPEN, ssl=trusted)
            self._opened = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
        return self._opened

    async def _send(self, path: str, body: dict[str, Any], note: Note) -> Response:
        streamed = bool(body.get("stream"))
        wants_usage = not streamed or path != CHAT or bool((body.get("stream_options") or {}).get("include_usage"))
        if not wants_usage:
            # We count it, and take it out again.
            body = body | {"stream_options": {"include_usage": True}}
        if streamed and path == CHAT:
            body = {"stream_interval": self._pace.tokens_an_event()} | body  # what the client asks for counts
        try:
            answer = await self._answer(path, body)
            if not streamed or answer.status != 200:
                async with answer:
                    return _relayed(answer.status, await answer.read(), body, note)
        except (aiohttp.ClientError, TimeoutError):
            return error_response(503, STOPPED, headers=TRY_AGAIN)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        relay = _relay(answer.content.iter_any(), body, wants_usage, note, self._pace)
        # The task runs after a disconnect too, wherever in the relay that falls.
        closing = BackgroundTask(_close, answer)
        return StreamingResponse(relay, headers=headers, media_type="text/event-stream", background=closing)


async def _close(answer: aiohttp.ClientResponse) -> None:
    answer.close()  # within a coroutine, or Starlette would have a thread do it


async def unless_gone(request: Request, work: Callable[[], Awaitable[Response]]) -> Response:
    """What `work` answers; it ends early when the client goes away. Raises the ApiError that `work` raises."""
    # Nobody reads this when the client has gone. (499: "client closed request".)
    outcome: Response | ApiError = Response(status_code=499)
    async with anyio.create_task_group() as group:
        group.start_soon(_cancel_on_disconnect, request, group.cancel_scope)
        try:
            outcome = await work()
        except ApiError as error:
            outcome = error
        group.cancel_scope.cancel()
    if isinstance(outcome, ApiError):
        raise outcome
    return outcome


async def _cancel_on_disconnect(request: Request, scope: anyio.CancelScope) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue
    scope.cancel()


async def _relay(
    chunks: AsyncIterator[bytes], body: Mapping[str, Any], wants_usage: bool, note: Note, pace: StreamPace
) -> AsyncIterator[bytes]:
    """The engine's events as they come, counted. An engine that dies on the way is told as one, as clients read.

    An answer that is cut off never says what it took; then its pieces are counted.
    """
    pieces, taken, first = 0, dict[str, Any](), time.monotonic()
    has_ended = "messages" not in body  # only a chat says why it ended
    try:
        async for events in _whole_events(chunks):
            first = first if pieces else time.monotonic()
            pieces += events.count(b"\n\n")
            if b'"usage"' in events:
                events, usage = _without_usage(events, wants_usage)
                taken = usage or taken  # those of an answer so far, where they are told with each event
            has_ended = has_ended or ENDED.search(events) is not None or FAILURE in events
            if not has_ended and DONE in events:
                # vLLM passes over the end of a chat that it stopped before the first token.
                events = events.replace(DONE, CUT_OFF + b"\n\n" + DONE)
            if events:
                yield in_our_words(events)
        pace.note(taken.get("completion_tokens", 0) // body.get("n", 1), time.monotonic() - first)
    except aiohttp.ClientError:
        yield CUT_OFF + b"\n\n"
    finally:
        # The first two pieces are the role and the first token.
        pieces += max(0, pieces - 2) * (body.get("stream_interval", 1) - 1)
        note.take_usage(taken or {"completion_tokens": pieces})


async def _whole_events(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """What came, cut at the ends of events (an empty line)."""
    rest = bytearray()
    async for chunk in chunks:
        looked_at = max(0, len(rest) - 1)  # an event of many megabytes is searched once, not with each of its chunks
        rest += chunk
        end = rest.rfind(b"\n\n", looked_at)
        if end >= 0:
            yield bytes(rest[: end + 2])
            del rest[: end + 2]
    if rest:
        yield bytes(rest)


def in_our_words(events: bytes) -> bytes:
    """The events, with what the engine says of its own failures put as we say it: it may quote paths and traces."""
    if FAILURE not in events and ABORTED not in events:
        return events
    told = events.split(b"\n\n")
    for place, event in enumerate(told):
        if ABORTED in event:
            told[place] = CUT_OFF
        elif event.startswith(FAILURE):
            code = json.loads(event.removeprefix(b"data: "))["error"].get("code")
            told[place] = event if isinstance(code, int) and code < 500 else CUT_OFF
    return b"\n\n".join(told)


def _without_usage(events: bytes, wanted: bool) -> tuple[bytes, dict[str, Any]]:
    """The events, less the one that only tells the usage where nobody asked for it; and that usage."""
    kept: list[bytes] = []
    usage: dict[str, Any] = {}
    for event in events.split(b"\n\n")[:-1]:
        data = event.partition(b"data: ")[2]
        content = json.loads(data) if b'"usage"' in data else {}
        found = content.get("usage") or (content.get("response") or {}).get("usage")
        usage = found or usage
        if wanted or not found or content.get("choices"):
            kept.append(event + b"\n\n")
    return b"".join(kept), usage


def asks_for_form(body: Mapping[str, Any]) -> bool:
    """Whether the answer is to be held to a form, as chat or responses ask for it."""
    asked = body.get("response_format") or (body.get("text") or {}).get("format") or {}
    return "structured_outputs" in body or asked.get("type", "text") != "text"


def _relayed(status: int, content: bytes, body: Mapping[str, Any], note: Note) -> Response:
    """The engine's whole answer to `body`, counted."""
    if status != 200:
        return _relayed_error(status, content, asks_for_form(body))
    if ABORTED in content:
        return error_response(503, STOPPED, headers=TRY_AGAIN)
    note.take_usage(json.loads(content).get("usage") or {})
    return Response(content, media_type="application/json")


def _relayed_error(status: int, content: bytes, for_form: bool) -> Response:
    """vLLM's refusal with its own words; its failures without, for they may quote paths and traces."""
    if status == 500 and for_form:
        # vLLM checks a form before it takes it, but xgrammar finds some faults (`minLength: -2`) only when it compiles
        # it, and others (a schema that nothing satisfies) when no token is left to go on with. Then vLLM says 500.
        return error_response(400, "The form of the answer (response_format, structured_outputs) cannot be fulfilled.")
    if status >= 500 or status < 400:
        return error_response(503, "The engine failed on this request.", headers=TRY_AGAIN)
    error = _error_in(content)
    if error is None:
        return error_response(status, "The engine refused this request.")
    return error_response(status, str(error.get("message", "")), error.get("param"))


def _error_in(said: bytes) -> dict[str, Any] | None:
    """The error object in an answer of vLLM, where there is one."""
    try:
        content = json.loads(said)
    except ValueError:
        return None
    error = content.get("error") if isinstance(content, dict) else None
    return error if isinstance(error, dict) else None
