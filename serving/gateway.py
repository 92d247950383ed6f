"""Assemble the API in front of the engine."""

import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

import anyio
from fastapi import FastAPI, Request
from starlette.responses import Response
from starlette.routing import Match, Route
from tokenizers import Tokenizer

from assistant.images import PictureLimits
from assistant.plain_text import PlainText
from serving.adapters import AdapterPlaces, AdapterShelf
from serving.chat_service import ChatService
from serving.doors import Doors, hang_doors
from serving.embedding_service import EmbeddingService
from serving.engine import Engine
from serving.errors import error_response, install_error_handlers
from serving.jobs.data_folder import DataFolder
from serving.jobs.job_service import JobService
from serving.jobs.runner import JobLimits
from serving.jobs.stored_files import FileLimits
from serving.model_folder import ModelFacts
from serving.openapi import describe_api
from serving.pictures import RemoteHosts, SafePictures
from serving.routes import adapters as adapter_routes
from serving.routes import captions, chat, embeddings, files, fine_tuning, information, models, responses
from serving.upstream import Upstream

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]


@dataclass(frozen=True)
class GatewayLimits:
    """What one request may cost, what one job may, and what the files of one key may take."""

    most_pictures: int = 8
    picture: PictureLimits = field(default_factory=PictureLimits)
    body_bytes: int = 32 * 2**20
    body_seconds: float = 10.0
    pictures_opened_at_once: int = max(2, os.cpu_count() or 2)
    files: FileLimits = field(default_factory=FileLimits)
    job: JobLimits = field(default_factory=JobLimits)


def create_gateway(
    engine: Engine,
    model_name: str,
    facts: ModelFacts,
    limits: GatewayLimits = GatewayLimits(),
    doors: Doors | None = None,
    remote_hosts: RemoteHosts | None = None,
    adapters: AdapterPlaces | None = None,
    data: DataFolder | None = None,
) -> FastAPI:
    """The API over `engine`. Pages may be mounted on the app that comes back; they use the API as any client does.

    Args:
        engine: need not be ready yet; requests are answered with 503 and the reason until it is.
        model_name: the one model that clients may ask for.
        facts: of the model's folder; its tokenizer says which words are special.
        doors: who may come in; everybody where nothing is said.
        remote_hosts: where pictures may be fetched; nowhere where nothing is said.
        adapters: where adapters come from and stay; an engine that takes none is asked for none.
        data: where uploaded files and jobs outlive the server, and the adapters that jobs make; without one no files
            are kept and nothing is taught. It is closed at the end.
    """
    upstream = Upstream(engine)
    places = adapters or AdapterPlaces()
    if data is not None and places.kept is None:
        places = replace(places, kept=data.adapters)
    shelf = AdapterShelf(engine, upstream, model_name, facts.folder, places)
    jobs = None if data is None else JobService(data, model_name, facts, shelf, limits.files, limits.job)
    doors = doors or Doors()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with shelf.running(), jobs.running() if jobs is not None else contextlib.nullcontext():
            yield
        await upstream.close()
        doors.quotas.keep()

    app = FastAPI(title="Kangaroo", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.chat_service = ChatService(
        engine=engine,
        upstream=upstream,
        model_name=model_name,
        adapters=shelf,
        plain_text=PlainText(Tokenizer.from_file(str(facts.folder / "tokenizer.json")), facts.picture_token),
        most_pictures=limits.most_pictures,
        picture_limits=limits.picture,
        pictures=SafePictures(limits.picture, remote_hosts, lambda: engine.picture_folder),
        context_length=facts.context_length,
        opening=anyio.CapacityLimiter(limits.pictures_opened_at_once),
    )
    app.state.embedding_service = EmbeddingService(facts.folder, model_name)
    app.state.job_service = jobs
    app.state.doors = doors
    hang_doors(app, doors, limits.body_bytes, limits.body_seconds)
    install_error_handlers(app)
    for route in (chat, responses, captions, embeddings, models, adapter_routes, files, fine_tuning, information):
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
