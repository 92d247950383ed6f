"""Fetching pictures: public https addresses only, each hop checked and pinned, within size and time, kept."""

import contextlib
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from assistant.images import PictureError, PictureLimits
from assistant.remote_pictures import RemotePictures, is_public
from tests.test_conversations import encoded

HOST = "pictures.test"


@dataclass
class Host:
    """A web server on this machine that calls itself `pictures.test`."""

    port: int
    trusted: ssl.SSLContext
    seen: list[tuple[str, str]] = field(default_factory=list)  # path and Host header of each request
    trickled: int = 0  # pictures of /slow that were awaited to their end

    def url(self, path: str) -> str:
        return f"https://{HOST}:{self.port}{path}"

    def fetcher(self, folder: Path, seconds: float = 20.0, max_bytes: int = 2**20) -> RemotePictures:
        """One that may connect to 127.0.0.1, where `pictures.test` is; every other name is on a private network."""
        names = {HOST: ["127.0.0.1"], "127.0.0.1": ["127.0.0.1"]}
        return RemotePictures(
            folder,
            PictureLimits(max_bytes=max_bytes),
            seconds,
            resolve=lambda host, port: names.get(host, ["10.0.0.1"]),
            allowed=lambda address: address == "127.0.0.1",
            verify=self.trusted,
        )


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl makes the certificate of the web server that this test starts, and is not here")
    folder = tmp_path_factory.mktemp("certificate")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={HOST}"]
    command += ["-addext", f"subjectAltName=DNS:{HOST}", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    found = Host(server.server_address[1], ssl.create_default_context(cafile=str(certificate)))
    server.RequestHandlerClass = _handler(found)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield found
    server.shutdown()
    server.server_close()


def _handler(host: Host) -> type[BaseHTTPRequestHandler]:
    redirects = {
        "/moved": "/cat.png",
        "/round": "/round",
        "/private": "https://intranet.test/cat.png",
        "/numeric": "https://10.1.2.3/cat.png",
        "/plain": f"http://{HOST}/cat.png",
        "/file": "file:///etc/passwd",
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host.seen.append((self.path, self.headers["Host"]))
            if self.path in redirects:
                self.send_response(302)
                self.send_header("Location", redirects[self.path])
                self.end_headers()
                return
            self.send_response(200 if self.path != "/gone" else 410)
            self.end_headers()
            if self.path == "/slow":
                for _ in range(100):
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    time.sleep(0.1)
                host.trickled += 1
            self.wfile.write(encoded() if self.path != "/large" else b"x" * 2_000_000)

        def log_message(self, *arguments: object) -> None:
            pass

        def handle(self) -> None:
            with contextlib.suppress(OSError):  # the client hangs up, as it should on slow and large pictures
                super().handle()

    return Handler


def test_a_picture_is_fetched_once_by_the_name_of_its_host_and_kept(host: Host, tmp_path: Path) -> None:
    host.seen.clear()
    fetcher = host.fetcher(tmp_path / "kept")
    file = fetcher.fetch(host.url("/cat.png"))
    assert file.read_bytes() == encoded()
    assert fetcher.fetch(host.url("/cat.png")) == host.fetcher(tmp_path / "kept").fetch(host.url("/cat.png")) == file
    assert host.seen == [("/cat.png", f"{HOST}:{host.port}")]
    assert fetcher.fetch(host.url("/moved")).read_bytes() == encoded()
    assert [path for path, _ in host.seen] == ["/cat.png", "/moved", "/cat.png"]
    assert sorted(tmp_path.rglob("*")) == sorted([tmp_path / "kept", file, fetcher.fetch(host.url("/moved"))])


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/round", "passed on more than 3 times"),
        ("/private", "intranet.test is not on the public internet"),
        ("/numeric", "10.1.2.3 is not on the public internet"),
        ("/plain", "only plain https"),
        ("/file", "only plain https"),
        ("/gone", "answers 410"),
        ("/large", "over the limit"),
    ],
)
def test_what_leads_elsewhere_or_is_too_large_is_not_kept(host: Host, tmp_path: Path, path: str, told: str) -> None:
    with pytest.raises(PictureError, match=told):
        host.fetcher(tmp_path).fetch(host.url(path))
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_trickles_is_given_up(host: Host, tmp_path: Path) -> None:
    with pytest.raises(PictureError, match=r"within 0\.5 seconds|cannot be fetched"):
        host.fetcher(tmp_path, seconds=0.5).fetch(host.url("/slow"))
    assert host.trickled == 0


def test_a_certificate_of_another_name_is_not_trusted(host: Host, tmp_path: Path) -> None:
    with pytest.raises(PictureError, match="ConnectError"):
        host.fetcher(tmp_path).fetch(f"https://127.0.0.1:{host.port}/cat.png")


def test_a_name_that_changes_its_address_is_asked_once_and_the_checked_address_is_used(
    host: Host, tmp_path: Path
) -> None:
    """DNS rebinding: the second answer would be another one, and nobody asks for it."""
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])
    fetcher = RemotePictures(
        tmp_path,
        resolve=lambda name, port: next(answers),
        allowed=lambda address: address == "127.0.0.1",
        verify=host.trusted,
    )
    assert fetcher.fetch(host.url("/cat.png")).read_bytes() == encoded()
    assert next(answers) == ["10.0.0.1"]


def test_one_private_address_among_several_is_enough_to_refuse(host: Host, tmp_path: Path) -> None:
    fetcher = RemotePictures(tmp_path, resolve=lambda name, port: ["93.184.216.34", "192.168.1.1"])
    with pytest.raises(PictureError, match="public internet"):
        fetcher.fetch(host.url("/cat.png"))


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1:{port}/cat.png",
        "https://localhost:{port}/cat.png",
        "https://0x7f000001:{port}/cat.png",
        "https://2130706433:{port}/cat.png",
        "https://127.1:{port}/cat.png",
        "https://0.0.0.0:{port}/cat.png",
        "https://[::1]:{port}/cat.png",
        "https://[::ffff:127.0.0.1]:{port}/cat.png",
        "https://example.org@127.0.0.1:{port}/cat.png",
        "https://127.0.0.1:{port}\\@example.org/cat.png",
        "http://127.0.0.1:{port}/cat.png",
        "https://127.0.0.1:99999/cat.png",
        "https:///cat.png",
        "https://[cat.png",
    ],
)
def test_nothing_on_this_machine_is_asked(host: Host, tmp_path: Path, url: str) -> None:
    host.seen.clear()
    with pytest.raises(PictureError):
        RemotePictures(tmp_path, verify=host.trusted).fetch(url.format(port=host.port))
    assert host.seen == []


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1",
        "fc00::1",
        "ff02::1",
        "::ffff:10.0.0.1",
        "2002:7f00:1::1",
        "64:ff9b::7f00:1",
        "2001:db8::1",
        "192.0.2.1",
        "198.18.0.1",
        "240.0.0.1",
    ],
)
def test_private_and_special_addresses_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700:4700::1111", "64:ff9b::808:808"])
def test_public_addresses_are(address: str) -> None:
    assert is_public(address)
