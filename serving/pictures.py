"""Make pictures safe for the engine, each once however often it is sent, and fetch them from allowed hosts only."""

import contextlib
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from ssl import SSLContext

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
_Place = tuple[Path | None, str, type]  # the folder that an engine reads in, a picture's name, and what it was sent as


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

    def safe_picture(self, source: str | bytes) -> EnginePicture:
        """The picture in `source`, a data URL or a file's bytes, as the engine gets it.

        The caller lets go of it when the engine has answered; if that is a refusal, it is to be checked.

        Raises:
            PictureError: it cannot be used, as far as is known before the engine opens a plain JPEG.
        """
        content = source.encode("utf-8", "surrogatepass") if isinstance(source, str) else source
        # A text and a file of the same bytes are told apart, for a text is decoded.
        place = (folder := self._folder(), name := name_of(content), type(source))
        with self._lock:
            if (kept := self._kept.get(place)) is not None:
                self._kept.move_to_end(place)
                kept.hold()
                return kept
        picture = decode_data_url(source, self.limits) if isinstance(source, str) else source
        made = self._made_safe(name, picture, folder)
        self._keep(place, made)
        return made

    def check(self, picture: EnginePicture) -> None:
        """Open what nobody but the engine has opened. Raises PictureError where it cannot be used."""
        if picture.is_unopened:
            content = decode_data_url(picture.url, self.limits)
            with self._room.for_pixels(read_header(content, self.limits).pixels):
                open_picture(content, self.limits)

    def _made_safe(self, name: str, content: bytes, folder: Path | None) -> EnginePicture:
        header = read_header(content, self.limits)
        if header.is_plain_jpeg:
            return plain_jpeg(name, content)
        with self._room.for_pixels(header.pixels):
            return picture_for_engine(name, open_picture(content, self.limits), len(content), folder)

    def _keep(self, place: _Place, picture: EnginePicture) -> None:
        with self._lock:
            if place not in self._kept and picture.size <= self._cache_bytes:
                picture.hold()
                self._kept[place] = picture
                self._kept_bytes += picture.size
            while self._kept_bytes > self._cache_bytes:
                _, oldest = self._kept.popitem(last=False)
                self._kept_bytes -= oldest.size
                oldest.let_go()
