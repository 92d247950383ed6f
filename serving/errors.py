"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}`, on every route."""

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from serving.notes import note_of

LONGEST_MESSAGE = 500


class ApiError(Exception):
    """A request that is answered with an error. The message may be shown to people."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = {"Retry-After": str(retry_after)} if retry_after else {}


def error_object(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object; the type follows from the HTTP status."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message[:LONGEST_MESSAGE], "type": kind, "param": param, "code": code}}


def error_response(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    # ASCII: a message may quote a lone surrogate out of the request, which has no UTF-8.
    content = json.dumps(error_object(status, message, param, code))
    return Response(content, status, dict(headers or {}), media_type="application/json")


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error of `app`, ours and the framework's, with OpenAI's error object."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error_response(error.status, str(error), error.param, error.code, error.headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return error_response(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> Response:
        message, param = describe(error.errors(), error.body)
        return error_response(400, message, param)

    # The traceback goes to the log of the server; the person asking is told no more than that it happened.
    @app.exception_handler(Exception)
    async def unexpected_error(request: Request, error: Exception) -> Response:
        headers = {"x-request-id": note_of(request).request_id}
        return error_response(HTTPStatus.INTERNAL_SERVER_ERROR, "The server failed; its log says why.", headers=headers)


def describe(errors: Sequence[Mapping[str, Any]], body: object) -> tuple[str, str | None]:
    """One sentence for pydantic's deepest complaint, and the name of the field (`messages.0.content`)."""
    if errors[0]["type"] == "json_invalid":
        return "The body is not valid JSON.", None
    # Of a union pydantic lists a complaint for each member. The one that got furthest is about what was meant.
    deepest = max(errors, key=lambda error: (len(_path(error, body)), not error["type"].endswith("_type")))
    param = ".".join(map(str, _path(deepest, body))) or None
    if deepest["type"] == "extra_forbidden":
        return f"Unrecognized request argument supplied: {param}", param
    message = deepest["msg"].removeprefix("Value error, ")
    if param is None and not isinstance(body, Mapping):
        return "The body must be a JSON object, sent with the header Content-Type: application/json.", None
    return (f"{param}: {message}" if param else message), param


def _path(error: Mapping[str, Any], body: object) -> list[str | int]:
    """The steps of pydantic's path that are in the body: it also names members of unions, which help nobody."""
    if error["loc"][:1] != ("body",):  # of the address: its names are the client's own
        return list(error["loc"][1:])
    path: list[str | int] = []
    place = body
    for step in error["loc"][1:]:
        if (isinstance(place, Mapping) and step in place) or (isinstance(place, list) and isinstance(step, int)):
            place = place[step]
            path.append(step)
    if error["type"] == "missing" and len(error["loc"]) > 1:
        path.append(error["loc"][-1])
    return path
