"""Leave pictures out of a request that the engine has seen before: their names are enough for it."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

MOST_NAMES = 10_000  # of the latest pictures, a hundred bytes each; vLLM remembers as many as its memory holds


class SeenPictures:
    """Remembers the names of the pictures that the engine has answered about.

    vLLM keeps what it made of a picture under its name (`uuid`), and neither decodes nor encodes it again when a later
    request gives the name alone. It may forget; then it refuses that request, and wants the picture.
    """

    def __init__(self, most: int = MOST_NAMES) -> None:
        self._most = most
        self._names: OrderedDict[str, None] = OrderedDict()

    def shortened(self, body: Mapping[str, Any]) -> dict[str, Any] | None:
        """The request without the pictures that the engine has seen; None where there is none to leave out."""
        known = {name for name in _names(body) if name in self._names}
        if not known:
            return None
        return {**body, "messages": [_without(message, known) for message in body["messages"]]}

    def remember(self, body: Mapping[str, Any]) -> None:
        """The engine has seen all pictures of this request."""
        for name in _names(body):
            self._names[name] = None
            self._names.move_to_end(name)
        while len(self._names) > self._most:
            self._names.popitem(last=False)

    def forget(self, body: Mapping[str, Any]) -> None:
        """The engine may have forgotten pictures of this request."""
        for name in _names(body):
            self._names.pop(name, None)


def _names(body: Mapping[str, Any]) -> Iterator[str]:
    """Of the pictures in a chat that have one."""
    for message in body.get("messages", ()):
        for part in message["content"]:
            if "uuid" in part:
                yield part["uuid"]


def _without(message: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    parts = [{**part, "image_url": None} if part.get("uuid") in known else part for part in message["content"]]
    return {**message, "content": parts}
