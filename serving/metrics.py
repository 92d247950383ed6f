"""Count what the gateway does, in Prometheus's words, and pass on what vLLM counts."""

import contextlib
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import Scope

from serving.notes import Note

# From a refusal in a millisecond to a long answer on a busy machine.
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
REASONS = {
    400: "invalid",
    401: "key",
    403: "origin",
    404: "unknown",
    405: "method",
    408: "slow",
    413: "too_large",
    415: "format",
    429: "limit",
    503: "unavailable",
}


class Metrics:
    """The gateway's own numbers, in a registry of their own: several gateways may live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "kangaroo_requests", "Requests answered.", ["route", "method", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "kangaroo_request_seconds", "From the request to its last byte.", ["route"],
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.first_piece = Histogram(
            "kangaroo_first_token_seconds", "From the request to the first event of a streamed answer.",
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.rejected = Counter("kangaroo_rejected", "Requests refused, by reason.", ["reason"], registry=self.registry)
        self.pictures = Counter("kangaroo_pictures", "Pictures sent in.", registry=self.registry)
        self.tokens = Counter("kangaroo_tokens", "Tokens read and written.", ["kind"], registry=self.registry)
        self.bytes = Counter("kangaroo_bytes", "Bytes of bodies.", ["direction"], registry=self.registry)
        self.running_now = Gauge("kangaroo_running_requests", "Requests that run.", registry=self.registry)
        self.engine_restarts = Gauge(
            "kangaroo_engine_restarts", "Engines that died and were started again.", registry=self.registry
        )
        self.engine_ready = Gauge("kangaroo_engine_ready", "Whether the engine answers.", registry=self.registry)

    @contextlib.contextmanager
    def running(self, path: str) -> Iterator[None]:
        """Count a request of the API as running. The pages hold connections open that are none."""
        if not path.startswith("/v1/"):
            yield
            return
        with self.running_now.track_inprogress():
            yield

    def observe(self, scope: Scope, path: str, status: int, seconds: float, note: Note) -> None:
        """Count a request that is over."""
        route = route_label(scope, path)
        method = scope["method"] if scope["method"] in METHODS else "other"
        self.requests.labels(route, method, str(status)).inc()
        self.seconds.labels(route).observe(seconds)
        if reason := REASONS.get(status):
            self.rejected.labels(reason).inc()
        self.pictures.inc(note.pictures)
        self.tokens.labels("prompt").inc(note.prompt_tokens)
        self.tokens.labels("completion").inc(note.completion_tokens)
        self.bytes.labels("in").inc(note.body_bytes)
        self.bytes.labels("out").inc(note.sent_bytes)
        if note.is_stream and note.first_piece is not None:
            self.first_piece.observe(note.first_piece - note.started)

    def text(self) -> bytes:
        """All of them as Prometheus reads them."""
        return generate_latest(self.registry)


def route_label(scope: Scope, path: str) -> str:
    """The route's own pattern, so that there are as many series as routes: paths are the client's to invent."""
    route = scope.get("route")
    if path.startswith(("/v1/", "/health", "/ready", "/metrics")):
        return str(getattr(route, "path", "other"))
    return "page"
