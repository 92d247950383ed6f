"""Pass a request on to the engine and its answer back, and let go of the engine when the client has gone."""

import json
from collections.abc import AsyncIterator
from typing import Any

import anyio
import httpx
from fastapi import Request
from starlette.background import BackgroundTask
from starlette.responses import Response, StreamingResponse

from serving.errors import error_object, error_response

SECONDS_TO_CONNECT = 5.0
TRY_AGAIN = {"Retry-After": "5"}


class Upstream:
    """One pool of connections to the engine, for all requests.

    There is no limit of time on answers: a long one is no fault. A client that goes away ends the engine's work on it.
    """

    def __init__(self, base_url: str, api_key: str | None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.AsyncClient(
            base_url=base_url,
            headers=headers,
            timeout=httpx.Timeout(None, connect=SECONDS_TO_CONNECT),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=32),
            # A proxy of the environment is not for a neighbour, and would see the key.
            trust_env=False,
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def post(self, request: Request, path: str, body: dict[str, Any]) -> Response:
        """Send `body` to the engine and relay what comes back, streamed when the engine streams it."""
        async with anyio.create_task_group() as group:
            group.start_soon(_cancel_on_disconnect, request, group.cancel_scope)
            answer = await self._send(path, body)
            group.cancel_scope.cancel()
            return answer
        # Only reached when the client went away: nobody reads this. (499: "client closed request".)
        return Response(status_code=499)

    async def _send(self, path: str, body: dict[str, Any]) -> Response:
        streamed = bool(body.get("stream"))
        try:
            answer = await self._client.send(self._client.build_request("POST", path, json=body), stream=streamed)
            if answer.status_code != 200:
                await answer.aread()
                return _relayed_error(answer)
        except httpx.TransportError:
            return error_response(503, "The engine stopped while it worked on this request.", headers=TRY_AGAIN)
        if not streamed:
            return Response(answer.content, media_type="application/json")
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        # The task runs after a disconnect too, wherever in the relay that falls.
        closing = BackgroundTask(answer.aclose)
        return StreamingResponse(_relay(answer), headers=headers, media_type="text/event-stream", background=closing)


async def _cancel_on_disconnect(request: Request, scope: anyio.CancelScope) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue
    scope.cancel()


async def _relay(answer: httpx.Response) -> AsyncIterator[bytes]:
    """The engine's events as they come. An engine that dies on the way is told as one, as clients read."""
    try:
        async for chunk in answer.aiter_bytes():
            yield chunk
    except httpx.TransportError:
        failure = error_object(503, "The engine stopped in the middle of the answer.")
        yield b"data: " + json.dumps(failure).encode() + b"\n\n"


def _relayed_error(answer: httpx.Response) -> Response:
    """vLLM's refusal with its own words; its failures without, for they may quote paths and traces."""
    if answer.status_code >= 500:
        return error_response(503, "The engine failed on this request.", headers=TRY_AGAIN)
    try:
        content = answer.json()
    except ValueError:
        content = None
    error = content.get("error") if isinstance(content, dict) else None
    if not isinstance(error, dict):
        return error_response(answer.status_code, "The engine refused this request.")
    return error_response(answer.status_code, str(error.get("message", "")), error.get("param"))
