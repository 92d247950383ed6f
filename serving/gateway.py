"""Assemble the API in front of the engine, and run both."""

import contextlib
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import Response
from starlette.routing import Match, Route
from tokenizers import Tokenizer

from assistant.images import PictureLimits
from assistant.models import ModelError
from assistant.plain_text import PlainText
from serving.chat_service import ChatService
from serving.doors import Doors, hang_doors
from serving.embedding_service import EmbeddingService
from serving.engine import Engine, EngineError, LocalEngine, Phase
from serving.errors import error_response, install_error_handlers
from serving.model_folder import ModelFacts
from serving.openapi import describe_api
from serving.routes import captions, chat, embeddings, information, models, responses
from serving.upstream import Upstream

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]


@dataclass(frozen=True)
class GatewayLimits:
    """What one request may cost."""

    most_pictures: int = 8
    picture: PictureLimits = field(default_factory=PictureLimits)
    body_bytes: int = 32 * 2**20
    body_seconds: float = 10.0
    pictures_opened_at_once: int = 2


def create_gateway(
    engine: Engine,
    model_name: str,
    facts: ModelFacts,
    limits: GatewayLimits = GatewayLimits(),
    doors: Doors | None = None,
) -> FastAPI:
    """The API over `engine`. Pages may be mounted on the app that comes back; they use the API as any client does.

    Args:
        engine: need not be ready yet; requests are answered with 503 and the reason until it is.
        model_name: the one model that clients may ask for.
        facts: of the model's folder; its tokenizer says which words are special.
        doors: who may come in; everybody where nothing is said.
    """
    upstream = Upstream(engine)
    doors = doors or Doors()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await upstream.close()

    app = FastAPI(title="Kangaroo", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.chat_service = ChatService(
        engine=engine,
        upstream=upstream,
        model_name=model_name,
        plain_text=PlainText(Tokenizer.from_file(str(facts.folder / "tokenizer.json")), facts.picture_token),
        most_pictures=limits.most_pictures,
        picture_limits=limits.picture,
        context_length=facts.context_length,
        opening=anyio.CapacityLimiter(limits.pictures_opened_at_once),
    )
    app.state.embedding_service = EmbeddingService(facts.folder, model_name)
    app.state.doors = doors
    hang_doors(app, doors, limits.body_bytes, limits.body_seconds)
    install_error_handlers(app)
    for route in (chat, responses, captions, embeddings, models, information):
        app.include_router(route.router)
    _add_unknown_routes(app)
    describe_api(app, model_name, needs_key=doors.keys is not None)
    return app


def _add_unknown_routes(app: FastAPI) -> None:
    """Answer what is left under /v1 ourselves, or a page mounted at / would answer it in its own way."""

    @app.api_route("/v1/{path:path}", methods=METHODS, include_in_schema=False)
    async def unknown(path: str, request: Request) -> Response:
        url = f"/v1/{path}"
        allowed: set[str] = set()
        for route in request.app.routes:
            if isinstance(route, Route) and route.matches(request.scope)[0] is Match.PARTIAL:
                allowed |= route.methods or set()
        if allowed:
            headers = {"Allow": ", ".join(sorted(allowed))}
            return error_response(405, f"{request.method} is not allowed for {url}.", headers=headers)
        return error_response(404, f"There is no {url} on this server.", code="unknown_url")


def serve(
    model_folder: Path,
    model_name: str,
    host: str,
    port: int,
    attach: Callable[[FastAPI], FastAPI] | None = None,
) -> int:
    """Start the engine and serve until Ctrl-C or SIGTERM; the exit code.

    The gateway, with what `attach` mounts on it, is up at once while the engine loads behind it.
    """
    try:
        with listen(host, port) as listener, LocalEngine(model_folder, model_name) as engine:
            app = create_gateway(engine, model_name, engine.facts)
            address = f"http://{host}:{listener.getsockname()[1]}"
            print(f"Kangaroo is at {address} (the engine's log: {engine.log_path})", flush=True)
            threading.Thread(target=_tell_changes, args=[engine], daemon=True).start()
            run(attach(app) if attach else app, listener)
    except (EngineError, ModelError, ListenError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


class ListenError(OSError):
    """The address cannot be listened on; the message says why and what to do."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket (port 0: any free one).

    Raises:
        ListenError: the port is in use or not allowed, or the host is not this machine.
    """
    if not 0 <= port <= 65_535:
        raise ListenError(f"Cannot listen on {host} port {port}: ports go from 0 to 65535. Choose another with --port.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ListenError(f"Cannot listen on {host} port {port}: {reason}. Choose another with --port.") from error
    return listener


def run(app: FastAPI, listener: socket.socket) -> None:
    """Serve `app` until Ctrl-C or SIGTERM."""
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, server_header=False)
    # uvicorn raises the signal that ended it once more. That is no error here, and must not stop the cleaning up.
    with contextlib.suppress(KeyboardInterrupt), _sigterm_as_interrupt():
        uvicorn.Server(config).run(sockets=[listener])


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell_changes(engine: LocalEngine) -> None:
    """Tell the person at the terminal what the engine does, whenever that changes."""
    told = None
    while (state := engine.state()).phase is not Phase.STOPPED:
        if state != told:
            told = state
            print(f"Engine: {state.reason}" if state.phase is not Phase.DEAD else "Engine: dead", flush=True)
            if state.phase is Phase.DEAD:
                print(f"The engine stopped: {state.reason}\n{engine.log_tail()}", file=sys.stderr, flush=True)
        time.sleep(0.5)
