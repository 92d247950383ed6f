"""Make pictures safe for the engine, each once however often it is sent, and fetch them from allowed hosts only."""

import contextlib
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from ssl import SSLContext
from typing import NamedTuple

import anyio

from assistant.images import (
    PictureError,
    PictureLimits,
    decode_data_url,
    open_picture,
    read_header,
)
from assistant.remote_pictures import RemotePictures, Resolve, addresses_of, is_public
from serving.engine_pictures import EnginePicture, name_of, picture_for_engine, plain_jpeg

SECONDS_TO_FETCH = 8.0
FETCHES_AT_ONCE = 8
LENGTH_AT_HAND = 500_000  # of a data URL or a file: hashed, decoded and encoded in half a millisecond
JPEG = b"\xff\xd8\xff"  # how its files begin


class _Place(NamedTuple):
    """Where a picture is remembered: the folder that the engine reads in, its name, and whether it came as text."""

    folder: Path | None
    name: str
    is_text: bool


class RemoteHosts:
    """The hosts whose pictures are fetched, over https, each hop's host and address checked, nothing kept."""

    def __init__(
        self,
        hosts: Collection[str],
        limits: PictureLimits,
        resolve: Resolve = addresses_of,
        allowed_address: Callable[[str], bool] = is_public,
        verify: SSLContext | bool = True,
    ) -> None:
        """`resolve`, `allowed_address` and `verify` are those of `RemotePictures`, for networks of one's own."""
        self.hosts = frozenset(host.lower() for host in hosts)
        self._limits, self._resolve, self._allowed, self._verify = limits, resolve, allowed_address, verify
        # Slow hosts hold threads of their own, not those that open pictures.
        self._slots = anyio.CapacityLimiter(FETCHES_AT_ONCE)

    async def fetch(self, url: str) -> bytes:
        """The bytes at `url`. Raises PictureError where it may not or cannot be fetched."""
        return await anyio.to_thread.run_sync(self._fetch, url, limiter=self._slots, abandon_on_cancel=True)

    def _fetch(self, url: str) -> bytes:
        with tempfile.TemporaryDirectory(prefix="kangaroo-picture-") as folder:
            remote = RemotePictures(
                Path(folder), self._limits, SECONDS_TO_FETCH, self._resolve_allowed, self._allowed, self._verify
            )
            return remote.fetch(url).read_bytes()

    def _resolve_allowed(self, host: str, port: int) -> Sequence[str]:
        """Asked at every hop, so that a redirect leads to an allowed host or nowhere."""
        if host.lower() not in self.hosts:
            raise PictureError(f"the picture: nothing is fetched from {host}; send it as a data URL.")
        return self._resolve(host, port)


class Room:
    """Lets threads unpack so many pixels at once, in the order they came: many small pictures, or one of the largest.

    A picture of 20 megapixels takes 150 MB for a moment, a WebP 300.
    """

    def __init__(self, most_pixels: int) -> None:
        self._most = self._free = most_pixels
        self._turn = threading.Lock()
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def for_pixels(self, pixels: int) -> Iterator[None]:
        wanted = min(pixels, self._most)
        # Whoever waits for much room keeps the turn, so that small pictures do not slip past for ever.
        with self._turn, self._changed:
            self._changed.wait_for(lambda: self._free >= wanted)
            self._free -= wanted
        try:
            yield
        finally:
            with self._changed:
                self._free += wanted
                self._changed.notify_all()


class SafePictures:
    """Makes pictures safe for the engine, and remembers what came out for the latest ones.

    A conversation sends its pictures again with every turn. The same bytes give the same pixels, so the engine too
    knows them and looks only once. Safe to call from several threads.
    """

    def __init__(
        self,
        limits: PictureLimits,
        remote: RemoteHosts | None = None,
        folder: Callable[[], Path | None] = lambda: None,
        cache_bytes: int = 64 * 2**20,
    ) -> None:
        """`folder` says where the engine reads files of ours now, if it does; another engine reads in another."""
        self.limits = limits
        self._remote = remote
        self._folder = folder
        self._cache_bytes = cache_bytes
        self._kept: OrderedDict[_Place, EnginePicture] = OrderedDict()
        self._kept_bytes = 0
        self._lock = threading.Lock()
        self._room = Room(limits.max_pixels)

    async def fetched(self, urls: Iterable[str]) -> dict[str, bytes]:
        """The bytes of those of `urls` that are no data URLs, all fetched at once, where any host is allowed.

        Raises PictureError for the first that may not or cannot be fetched.
        """
        remote = self._remote
        found: dict[str, bytes] = {}
        if remote is None:
            return found
        failed: list[PictureError] = []

        async def fetch(url: str) -> None:
            try:
                found[url] = await remote.fetch(url)
            except PictureError as error:
                failed.append(error)
                group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            for url in {url for url in urls if url[:5].lower() != "data:"}:
                group.start_soon(fetch, url)
        if failed:
            raise failed[0]
        return found

    def at_hand(self, source: str | bytes) -> EnginePicture | None:
        """As `safe_picture`, where that takes less time than a thread takes to begin; None where it may take more.

        So it is for a picture that is remembered, and for a plain JPEG. Raises PictureError.
        """
        if len(source) > LENGTH_AT_HAND:
            return None
        place = self._place_of(source)
        if (kept := self._remembered(place)) is not None:
            return kept
        content = self._content_of(source)
        if not content.startswith(JPEG) or not read_header(content, self.limits).is_plain_jpeg:
            return None
        return self._remember(place, plain_jpeg(place.name, content))

    def safe_picture(self, source: str | bytes) -> EnginePicture:
        """The picture in `source`, a data URL or a file's bytes, as the engine gets it.

        The caller lets go of it when the engine has answered; if that is a refusal, it is to be checked.

        Raises:
            PictureError: it cannot be used, as far as is known before the engine opens a plain JPEG.
        """
        place = self._place_of(source)
        if (kept := self._remembered(place)) is not None:
            return kept
        return self._remember(place, self._made_safe(place, self._content_of(source)))

    def check(self, picture: EnginePicture) -> None:
        """Open what nobody but the engine has opened. Raises PictureError where it cannot be used."""
        if picture.is_unopened:
            content = decode_data_url(picture.url, self.limits)
            with self._room.for_pixels(read_header(content, self.limits).pixels):
                open_picture(content, self.limits)

    def _place_of(self, source: str | bytes) -> _Place:
        content = source.encode("utf-8", "surrogatepass") if isinstance(source, str) else source
        return _Place(self._folder(), name_of(content), isinstance(source, str))

    def _content_of(self, source: str | bytes) -> bytes:
        return decode_data_url(source, self.limits) if isinstance(source, str) else source

    def _made_safe(self, place: _Place, content: bytes) -> EnginePicture:
        header = read_header(content, self.limits)
        if header.is_plain_jpeg:
            return plain_jpeg(place.name, content)
        with self._room.for_pixels(header.pixels):
            return picture_for_engine(place.name, open_picture(content, self.limits), len(content), place.folder)

    def _remembered(self, place: _Place) -> EnginePicture | None:
        with self._lock:
            if (kept := self._kept.get(place)) is not None:
                self._kept.move_to_end(place)
                kept.hold()
            return kept

    def _remember(self, place: _Place, picture: EnginePicture) -> EnginePicture:
        with self._lock:
            if place not in self._kept and picture.size <= self._cache_bytes:
                picture.hold()
                self._kept[place] = picture
                self._kept_bytes += picture.size
            while self._kept_bytes > self._cache_bytes:
                _, oldest = self._kept.popitem(last=False)
                self._kept_bytes -= oldest.size
                oldest.let_go()
        return picture
