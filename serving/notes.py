"""What is noted of a request while it runs: who asks, what it costs, when its answer began."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import HTTPConnection

from serving.engine_pictures import EnginePicture
from serving.keys import Key


@dataclass
class Note:
    """One request's. `first_piece` is the time of the first event of a streamed answer; times are `time.monotonic`.

    `held` are the pictures that the engine still reads, each with the field that it came in. No word of the request is
    in here, except in `body` where the person who runs the server told so.
    """

    request_id: str
    started: float = field(default_factory=time.monotonic)
    first_piece: float | None = None
    is_stream: bool = False
    key: Key | None = None
    charge_pictures: Callable[[int], None] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    pictures: int = 0
    body_bytes: int = 0
    sent_bytes: int = 0
    body: bytes | None = None
    held: list[tuple[EnginePicture, str]] = field(default_factory=list)

    def owner(self) -> str | None:
        """The name of the key, to which belongs what the request makes; None where no key is asked for."""
        return self.key.name if self.key else None

    def let_go(self) -> None:
        """Let go of the pictures, for the request is over."""
        while self.held:
            self.held.pop()[0].let_go()

    def take_pictures(self, count: int) -> None:
        """Count pictures before they are looked at. Raises ApiError (429) where the key may send no more today."""
        if self.charge_pictures is not None:
            self.charge_pictures(count)
        self.pictures += count

    def take_usage(self, usage: dict[str, Any]) -> None:
        """Count what the engine says that an answer took (`prompt_tokens` or `input_tokens`, and so on)."""
        prompt = usage.get("prompt_tokens", usage.get("input_tokens", 0)) or 0
        completion = usage.get("completion_tokens", usage.get("output_tokens", 0)) or 0
        self.prompt_tokens += int(prompt)
        self.completion_tokens += int(completion)


def note_of(connection: HTTPConnection) -> Note:
    """The note of this request, which `serving.journal` began."""
    note = connection.state.note
    assert isinstance(note, Note)
    return note
