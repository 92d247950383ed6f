"""Fetch pictures over https from public addresses only, within bounds of size and time, and keep them in a folder."""

import hashlib
import ipaddress
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as WaitedTooLong
from pathlib import Path
from ssl import SSLContext
from urllib.parse import urljoin, urlsplit

import httpx

from assistant.images import DEFAULT_LIMITS, PictureError, PictureLimits

MOST_HOPS = 4  # the first address and three redirects
SECONDS = 20.0  # for a picture, all hops and its bytes together
REDIRECTS = (301, 302, 303, 307, 308)

Resolve = Callable[[str, int], Sequence[str]]


def addresses_of(host: str, port: int) -> list[str]:
    """The addresses that the system's resolver gives for `host`."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def is_public(address: str) -> bool:
    """Whether `address` is one of the public internet: not this machine, a private network, or a special range."""
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        # These carry an IPv4 address inside, which decides.
        inner = parsed.ipv4_mapped or parsed.sixtofour or (parsed.teredo[1] if parsed.teredo else None)
        if inner is not None:
            return is_public(str(inner))
        if parsed in ipaddress.IPv6Network("64:ff9b::/96"):
            return is_public(str(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)))
    return parsed.is_global and not parsed.is_multicast


class RemotePictures:
    """Pictures by their https address, each fetched once and kept in `folder`.

    At every hop the host is resolved, each of its addresses must be public, and the connection goes to the address
    that was checked, so that a name that changes its address in between leads nowhere. No proxy of the environment is
    used: it would resolve the name again.
    """

    def __init__(
        self,
        folder: Path,
        limits: PictureLimits = DEFAULT_LIMITS,
        seconds: float = SECONDS,
        resolve: Resolve = addresses_of,
        allowed: Callable[[str], bool] = is_public,
        verify: SSLContext | bool = True,
    ) -> None:
        """`resolve`, `allowed` and `verify` (what certificates are trusted) are for networks of one's own."""
        self.folder, self.limits, self.seconds = folder, limits, seconds
        self._resolve, self._allowed, self._verify = resolve, allowed, verify

    def fetch(self, url: str) -> Path:
        """The file of the picture at `url`, fetched if it is not there yet; what it holds is not looked at.

        Raises:
            PictureError: no https, no public address, an answer that is no success, too large, or too slow.
        """
        file = self.folder / hashlib.sha256(url.encode()).hexdigest()
        if file.is_file():
            return file
        content = self._download(url)
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as partial:
            partial.write(content)
        Path(partial.name).replace(file)
        return file

    def _download(self, url: str) -> bytes:
        deadline = time.monotonic() + self.seconds
        address = url
        for _ in range(MOST_HOPS):
            answer = self._one_hop(url, address, deadline)
            if isinstance(answer, bytes):
                return answer
            address = urljoin(address, answer)
        raise PictureError(f"{url}: it is passed on more than {MOST_HOPS - 1} times.")

    def _one_hop(self, url: str, address: str, deadline: float) -> bytes | str:
        """The bytes at `address`, or the address that it passes on to; `url` is what errors name."""
        host, port, pinned = self._checked(url, address, deadline)
        timeout = httpx.Timeout(max(0.1, min(10.0, deadline - time.monotonic())))
        request_url = httpx.URL(address).copy_with(host=pinned)
        headers = {
            "Host": host if port == 443 else f"{host}:{port}",
            "Accept": "image/*",
            "Accept-Encoding": "identity",
        }
        try:
            with (
                httpx.Client(verify=self._verify, trust_env=False, timeout=timeout, follow_redirects=False) as client,
                client.stream("GET", request_url, headers=headers, extensions={"sni_hostname": host}) as answer,
            ):
                if answer.status_code in REDIRECTS:
                    return answer.headers.get("Location", "")
                if answer.status_code != 200:
                    raise PictureError(f"{url}: the host answers {answer.status_code}.", 404)
                return self._read(url, answer, deadline)
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            raise PictureError(f"{url}: it cannot be fetched ({type(error).__name__}).") from error

    def _read(self, url: str, answer: httpx.Response, deadline: float) -> bytes:
        content = bytearray()
        # As it comes: pieces of a set size would be waited for, however slowly they fill.
        for piece in answer.iter_raw():
            content += piece
            if len(content) > self.limits.max_bytes:
                raise PictureError(f"{url}: over the limit of {self.limits.max_bytes / 2**20:.3g} MiB.", 413)
            if time.monotonic() > deadline:
                raise PictureError(f"{url}: not there within {self.seconds:g} seconds.")
        return bytes(content)

    def _checked(self, url: str, address: str, deadline: float) -> tuple[str, int, str]:
        """Host, port, and the address to connect to, which is allowed."""
        try:
            parts = urlsplit(address)
            host, port = parts.hostname, parts.port or 443
        except ValueError as error:
            raise PictureError(f"{url}: this is no web address.") from error
        if parts.scheme != "https" or not host or parts.username is not None or "\\" in address:
            raise PictureError(f"{url}: only plain https addresses are fetched.")
        pool = ThreadPoolExecutor(1)
        try:
            found = pool.submit(self._resolve, host, port).result(max(0.1, deadline - time.monotonic()))
        except (OSError, UnicodeError, WaitedTooLong) as error:
            raise PictureError(f"{url}: the host {host} is not found.", 404) from error
        finally:
            pool.shutdown(wait=False)
        if not found or not all(self._allowed(each) for each in found):
            raise PictureError(f"{url}: the host {host} is not on the public internet; nothing is fetched from there.")
        return host, port, found[0]
