"""Hold the tower and its text half that lie beside a model: loaded when first asked for, one request at a time."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import anyio
from fastapi import Request

from assistant.models import EMBEDDER, ModelError
from serving.errors import ApiError

if TYPE_CHECKING:
    from assistant.embeddings import Embedder

Result = TypeVar("Result")


@dataclass
class EmbeddingService:
    """What the routes work with that need no engine.

    torch takes seconds to import and the gateway does without it, so the embedder is loaded by the first request for
    it, in a thread. One request at a time has it; the API's other requests go on meanwhile.
    """

    model_folder: Path
    model_name: str
    _one_at_a_time: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(1))
    _loaded: "Embedder | None" = None

    async def run(self, work: "Callable[[Embedder], Result]") -> Result:
        """What `work` makes of the embedder, in a thread.

        Raises:
            ApiError: the model has no text half beside it (404) or a damaged one (503), and what `work` raises.
        """
        if not (self.model_folder / EMBEDDER).is_dir():
            message = (
                f"The model {self.model_name} has no text tower beside it: it chats, but cannot embed or classify."
            )
            raise ApiError(404, message, code="no_embedder")
        return await anyio.to_thread.run_sync(lambda: work(self._embedder()), limiter=self._one_at_a_time)

    def _embedder(self) -> "Embedder":
        if self._loaded is None:
            from assistant.embeddings import load_embedder

            try:
                self._loaded = load_embedder(self.model_folder / EMBEDDER)
            except ModelError as error:
                raise ApiError(503, "The text tower beside the model cannot be loaded.", code="no_embedder") from error
        return self._loaded


async def embedding_service(request: Request) -> EmbeddingService:
    """The service of the app that `request` came to."""
    service = request.app.state.embedding_service
    assert isinstance(service, EmbeddingService)
    return service
