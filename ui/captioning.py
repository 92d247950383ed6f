"""Caption many picture files through an OpenAI-compatible server, several at once."""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import httpx

from assistant.images import PictureError, encode_data_url, open_picture, read_picture
from assistant.questions import CAPTION_STYLES, CaptionStyle, tidied
from ui.caption_file import CaptionFile

SECONDS_FOR_AN_ANSWER = 600.0
MOST_TRIES = 60  # of a server that says that it will be back, five seconds apart


class ServerError(RuntimeError):
    """The server cannot be asked on; the message says why."""


@dataclass(frozen=True)
class Captioned:
    """What became of a picture: a caption, or what is wrong with it; `is_new` where the server was asked."""

    path: Path
    sha256: str = ""
    caption: str = ""
    is_new: bool = False
    error: str | None = None


class CaptionServer:
    """Any OpenAI-compatible server, such as `kangaroo serve` or a bare vLLM; safe to use from several threads."""

    def __init__(self, address: str, api_key: str | None, model: str | None, style: CaptionStyle) -> None:
        """`model` is the server's first where None. Raises ServerError where it does not answer."""
        self.style = style
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        base = address.rstrip("/").removesuffix("/v1")
        try:
            self._client = httpx.Client(base_url=base, headers=headers, timeout=SECONDS_FOR_AN_ANSWER, trust_env=False)
        except httpx.InvalidURL as error:
            raise ServerError(f"{address} is no address of a server; it looks like http://localhost:8000") from error
        self.model = model or self._first_model()

    def caption(self, picture: bytes, name: str) -> str:
        """What the model says. Raises PictureError where the picture is at fault, ServerError where the server is."""
        url = encode_data_url(open_picture(picture, name=name))
        words = CAPTION_STYLES[self.style]
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": words.question}]
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        body |= {"max_tokens": words.max_tokens, "temperature": 0}
        answer = self._asked("POST", "/v1/chat/completions", body, name)
        return tidied(str(answer["choices"][0]["message"]["content"]), self.style)

    def _first_model(self) -> str:
        try:
            return str(self._asked("GET", "/v1/models")["data"][0]["id"])
        except (LookupError, TypeError) as error:
            raise ServerError(f"{self._client.base_url} lists no model; name one with --model") from error

    def _asked(self, method: str, path: str, body: dict[str, Any] | None = None, name: str = "") -> dict[str, Any]:
        for tries in range(MOST_TRIES):
            try:
                answer = self._client.request(method, path, json=body)
            except httpx.HTTPError as error:
                raise ServerError(f"{self._client.base_url} does not answer ({type(error).__name__})") from error
            # vLLM fails a request for a picture that an aborted one showed too, and answers it the second time.
            if answer.status_code == 500 and tries < 2:
                continue
            if answer.status_code not in (429, 503):
                break
            time.sleep(min(60, int(answer.headers.get("retry-after", 5))))
        if answer.status_code == 200:
            try:
                return dict(answer.json())
            except (ValueError, TypeError) as error:
                raise ServerError(f"{self._client.base_url} does not speak OpenAI's API") from error
        said = _message(answer)
        if answer.status_code in (400, 413, 415, 422) and name:
            raise PictureError(f"{name}: {said}", answer.status_code)
        raise ServerError(f"{self._client.base_url} refuses ({answer.status_code}): {said}")


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.reason_phrase


def caption_files(files: Iterable[Path], server: CaptionServer, kept: CaptionFile, at_once: int) -> Iterator[Captioned]:
    """Each file as it is done, written into `kept`; those that are there already are only looked up.

    Raises ServerError; what was captioned until then is kept.
    """

    def work(path: Path) -> Captioned:
        try:
            content = read_picture(path)
            sha256 = hashlib.sha256(content).hexdigest()
            known = kept.caption_of(sha256)
            caption = server.caption(content, str(path)) if known is None else known
        except PictureError as error:
            return Captioned(path, error=str(error))
        return Captioned(path, sha256, caption, is_new=known is None)

    for done in _as_completed(work, files, at_once):
        if done.error is None and not kept.has(done.path, done.sha256):
            kept.add(done.path, done.sha256, done.caption)
        yield done


def _as_completed(work: Callable[[Path], Captioned], files: Iterable[Path], at_once: int) -> Iterator[Captioned]:
    rest = iter(files)
    pool = ThreadPoolExecutor(at_once)
    running: set[Future[Captioned]] = set()
    try:
        while True:
            running |= {pool.submit(work, path) for path in islice(rest, at_once - len(running))}
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        # Who stops early does not wait for pictures that nobody wants any more.
        pool.shutdown(wait=False, cancel_futures=True)
