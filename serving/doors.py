"""Put what every request passes around the API, in order: log, origin, key and limits, room, size of the body."""

from dataclasses import dataclass, field

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from serving.access import Access
from serving.admission import Admission, Drain
from serving.body_limit import BodyLimit
from serving.journal import Journal
from serving.keys import KeyRing
from serving.metrics import Metrics
from serving.origins import SameOrigin
from serving.quotas import Quotas

SECONDS_TO_DRAIN = 25.0  # container platforms kill after 30
HEADERS_FOR_PAGES = ["x-request-id", "retry-after"]


@dataclass(frozen=True)
class Doors:
    """Who may come in and what is told of them.

    Without `keys` everybody who reaches the port may. `origins` are those of other pages that may use the API
    (`serving.origins.checked_origin`), `names` other names that this machine goes by. Words and pictures of requests
    are logged only with `log_content`.
    """

    keys: KeyRing | None = None
    origins: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    log_content: bool = False
    most_running: int = 256
    drain: Drain = field(default_factory=lambda: Drain(SECONDS_TO_DRAIN))
    metrics: Metrics = field(default_factory=Metrics)
    quotas: Quotas = field(default_factory=Quotas)


def hang_doors(app: FastAPI, doors: Doors, body_bytes: int, body_seconds: float) -> None:
    """Add the middleware to `app`; the one added last is passed first."""
    app.add_middleware(BodyLimit, max_bytes=body_bytes, max_seconds=body_seconds, keep_body=doors.log_content)
    app.add_middleware(Admission, drain=doors.drain, most_running=doors.most_running)
    if doors.keys is not None:
        app.add_middleware(Access, keys=doors.keys, quotas=doors.quotas)
    if doors.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=doors.origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "x-request-id"],
            expose_headers=HEADERS_FOR_PAGES,
        )
    app.add_middleware(SameOrigin, allowed=doors.origins, names=doors.names)
    app.add_middleware(Journal, metrics=doors.metrics, log_content=doors.log_content)
