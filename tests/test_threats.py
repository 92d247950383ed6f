"""What strangers send to a server, and what must hold: private addresses, bombs, damaged pictures, huge bodies."""

import base64
import contextlib
import io
import json
import random
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image, PngImagePlugin

import serving.pictures
from assistant.images import DEFAULT_LIMITS, PictureLimits, decode_data_url, open_picture
from assistant.models import find_model
from serving.engine import RemoteEngine
from serving.gateway import create_gateway
from serving.model_folder import ModelFacts, read_model_folder
from serving.pictures import RemoteHosts, SafePictures
from tests.conftest import served
from tests.faulty_server import Fault, faulty_server
from tests.small_engine import SmallEngine, small_engine
from tests.test_command_line import huge_png
from tests.test_conversations_remote import HOST, Host, host  # noqa: F401 - `host` is a fixture
from tests.test_engine import wait_until
from tests.test_gateway_life import gateway_process

PATH = "/v1/chat/completions"
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
LEAKS = ("Traceback", " at 0x", "/home", "/root", "site-packages", "object at", "PIL", ".py")


@pytest.fixture(scope="module")
def facts() -> ModelFacts:
    return read_model_folder(find_model(None))


@pytest.fixture(scope="module")
def engine() -> Iterator[SmallEngine]:
    with small_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def client(facts: ModelFacts, engine: SmallEngine) -> Iterator[httpx.Client]:
    with (
        served(create_gateway(engine, "joey", facts)) as address,
        httpx.Client(base_url=address, timeout=120, trust_env=False) as client,
    ):
        yield client


def question(*urls: str) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"model": "joey", "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]}


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def encoded(image: Image.Image, format: str = "PNG", **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **how)
    return buffer.getvalue()


def assert_refused(answer: httpx.Response) -> None:
    """A 4xx with OpenAI's error object that lets nothing out."""
    assert 400 <= answer.status_code < 500, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    for leak in LEAKS:
        assert leak not in answer.text


# -- Addresses ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def private_host() -> Iterator[tuple[int, list[str]]]:
    """A server on this machine that nobody outside may make us ask: its port, and what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(encoded(Image.new("RGB", (8, 8))))

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1], asked
    server.shutdown()
    server.server_close()


SPELLINGS = (
    "{scheme}://127.0.0.1:{port}/a.png", "{scheme}://localhost:{port}/a.png", "{scheme}://127.1:{port}/a.png",
    "{scheme}://0x7f000001:{port}/a.png", "{scheme}://2130706433:{port}/a.png", "{scheme}://0177.0.0.1:{port}/a.png",
    "{scheme}://0.0.0.0:{port}/a.png", "{scheme}://0:{port}/a.png", "{scheme}://[::1]:{port}/a.png",
    "{scheme}://[::ffff:127.0.0.1]:{port}/a.png", "{scheme}://[::ffff:7f00:1]:{port}/a.png",
    "{scheme}://pictures.test@127.0.0.1:{port}/a.png", "{scheme}://pictures.test:80@127.0.0.1:{port}/a.png",
    "{scheme}://127.0.0.1:{port}\\@pictures.test/a.png", "{scheme}:\\\\127.0.0.1:{port}\\a.png",
    "{scheme}://pictures.test%00@127.0.0.1:{port}/", "{scheme}:127.0.0.1:{port}/a.png", "//127.0.0.1:{port}/a.png",
    " {scheme}://127.0.0.1:{port}/a.png", "{scheme}://127.0.0.1:{port}/a.png#data:image/png;base64,",
    "{scheme}://①②⑦.⓪.⓪.①:{port}/a.png", "{scheme}://localhost.:{port}/a.png",
)  # fmt: skip
FILES = (
    "file:///etc/passwd", "file://localhost/etc/passwd", "FILE:///etc/passwd", "file:/etc/passwd", "/etc/passwd",
    "../../../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "data:image/png;base64,../../etc/passwd", "~/.ssh/id_rsa",
    "ftp://127.0.0.1/a.png", "gopher://127.0.0.1/", "jar:file:///etc!/passwd", "\x00", "https://", "https://[", "data:",
)  # fmt: skip


@pytest.mark.parametrize(
    "hosts", [(), ("pictures.test",), ("127.0.0.1", "localhost", "::1", "0x7f000001", "2130706433")]
)
def test_no_spelling_of_a_private_address_is_asked(
    hosts: tuple[str, ...], facts: ModelFacts, engine: SmallEngine, private_host: tuple[int, list[str]]
) -> None:
    """Not even where somebody allowed the host: its address must be a public one."""
    port, asked = private_host
    remote = RemoteHosts(hosts, DEFAULT_LIMITS) if hosts else None
    urls = [spelling.format(scheme=scheme, port=port) for spelling in SPELLINGS for scheme in ("http", "https")]
    with (
        served(create_gateway(engine, "joey", facts, remote_hosts=remote)) as address,
        httpx.Client(base_url=address, timeout=60, trust_env=False) as client,
    ):
        engine.seen.clear()
        for url in (*urls, *FILES):
            answer = client.post(PATH, json=question(url))
            assert_refused(answer)
            assert "root:" not in answer.text
    assert asked == []
    assert engine.seen == []


def test_a_picture_of_an_allowed_host_is_fetched_by_us_and_never_by_the_engine(
    facts: ModelFacts,
    engine: SmallEngine,
    host: Host,  # noqa: F811
) -> None:
    remote = RemoteHosts(
        [HOST], DEFAULT_LIMITS,
        resolve=lambda name, port: {HOST: ["127.0.0.1"]}.get(name, ["10.0.0.1"]),
        allowed_address=lambda address: address == "127.0.0.1",
        verify=host.trusted,
    )  # fmt: skip
    with (
        served(create_gateway(engine, "joey", facts, remote_hosts=remote)) as address,
        httpx.Client(base_url=address, timeout=60, trust_env=False) as client,
    ):
        engine.seen.clear()
        for path in ("/cat.png", "/moved"):
            assert client.post(PATH, json=question(host.url(path))).status_code == 200
        first, second = (body["messages"][0]["content"][0] for body in engine.seen)
        assert first["image_url"]["url"].startswith("data:image/bmp;base64,")
        assert second["uuid"] == first["uuid"], "both addresses lead to one picture"
        assert second["image_url"] is None, "it goes to the engine once"
        host.seen.clear()
        for path in ("/private", "/numeric", "/plain", "/file", "/round", "/gone"):
            assert_refused(client.post(PATH, json=question(host.url(path))))
        for url in ("https://elsewhere.test/cat.png", host.url("/cat.png").replace("https", "http")):
            assert_refused(client.post(PATH, json=question(url)))
        assert {path for path, _ in host.seen} == {"/private", "/numeric", "/plain", "/file", "/round", "/gone"}
        assert len(engine.seen) == 2


def test_a_host_that_trickles_is_given_up_and_others_are_answered_meanwhile(
    facts: ModelFacts,
    engine: SmallEngine,
    host: Host,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As many at once as are fetched at once; pictures that are sent along wait for none of them."""
    assert serving.pictures.SECONDS_TO_FETCH < 10
    monkeypatch.setattr(serving.pictures, "SECONDS_TO_FETCH", 4.0)
    remote = RemoteHosts(
        [HOST], DEFAULT_LIMITS,
        resolve=lambda name, port: ["127.0.0.1"], allowed_address=lambda address: True, verify=host.trusted,
    )  # fmt: skip
    with (
        served(create_gateway(engine, "joey", facts, remote_hosts=remote)) as address,
        httpx.Client(base_url=address, timeout=60, trust_env=False) as client,
        ThreadPoolExecutor(serving.pictures.FETCHES_AT_ONCE) as pool,
    ):
        host.seen.clear()
        slow = [
            pool.submit(client.post, PATH, json=question(host.url("/slow")))
            for _ in range(serving.pictures.FETCHES_AT_ONCE)
        ]
        wait_until(lambda: len(host.seen) == len(slow), 30, "all of them trickle")
        small = data_url(encoded(Image.new("RGB", (8, 8))))
        assert client.post(PATH, json=question(small)).status_code == 200
        assert not any(each.done() for each in slow)
        for each in slow:
            assert_refused(each.result(60))


# -- Pictures ----------------------------------------------------------------------------------------------------------


def mutated(content: bytes, draw: random.Random) -> bytes:
    """`content` with some bytes flipped, cut off, doubled or taken out."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        place = draw.randrange(len(changed))
        changed[place] = draw.randrange(256)
    kind = draw.random()
    if kind < 0.15:
        changed = changed[: draw.randrange(1, len(changed))]
    elif kind < 0.25:
        start = draw.randrange(len(changed))
        del changed[start : start + draw.randrange(1, 64)]
    elif kind < 0.35:
        start = draw.randrange(len(changed))
        changed[start:start] = changed[start : start + draw.randrange(1, 64)]
    return bytes(changed)


@pytest.mark.parametrize("count", [150, pytest.param(2_000, marks=pytest.mark.slow)])
def test_mutated_pictures_never_fail_us(count: int, client: httpx.Client) -> None:
    draw = random.Random(0)
    whole = {format: encoded(Image.effect_noise((48, 32), 90).convert("RGB"), format) for format in FORMATS}
    good = question(data_url(whole["PNG"]))
    statuses: dict[int, int] = {}
    for number in range(count):
        format = FORMATS[number % len(FORMATS)]
        answer = client.post(PATH, json=question(data_url(mutated(whole[format], draw))))
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
        if answer.status_code != 200:
            assert_refused(answer)
            assert answer.status_code in (400, 413, 415)
        if number % 50 == 0:
            assert client.post(PATH, json=good).status_code == 200
    assert len(statuses) >= 3, "some are read all the same, some are damaged, some no picture any more"


def test_eight_bombs_at_once_do_not_fill_the_memory(tmp_path: Path) -> None:
    """In a process of its own, whose memory is looked at all the while."""
    frames = [Image.new("P", (64, 64), number % 255) for number in range(500)]
    lying_png, lying_gif = (bytearray(encoded(Image.new("L", (8, 8)), format)) for format in ("PNG", "GIF"))
    lying_png[16:24] = (60_000).to_bytes(4, "big") * 2
    lying_png[29:33] = zlib.crc32(lying_png[12:29]).to_bytes(4, "big")
    lying_gif[6:10] = (30_000).to_bytes(2, "little") * 2
    texts = PngImagePlugin.PngInfo()
    for number in range(40):
        texts.add_text(f"text {number}", "x" * 4_000_000, zip=True)
    bombs = [
        huge_png(tmp_path / "bits.png").read_bytes(),
        huge_png(tmp_path / "large.png", 13_000).read_bytes(),
        bytes(lying_png),
        bytes(lying_gif),
        encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        encoded(Image.new("RGB", (8, 8)), "PNG", pnginfo=texts),
    ]
    largest = [encoded(Image.new("RGB", (4_400, 4_400)), format) for format in ("JPEG", "PNG", "WEBP")]
    with (
        small_engine() as engine,
        gateway_process(engine, tmp_path) as (process, address),
        httpx.Client(base_url=address, timeout=120, trust_env=False) as client,
    ):
        small = data_url(encoded(Image.new("RGB", (8, 8))))
        assert client.post(PATH, json=question(small)).status_code == 200
        server = psutil.Process(process.pid)
        statuses, more = asked_at_once(client, [bombs[number % len(bombs)] for number in range(8)], server)
        assert statuses[:4] == [413] * 4
        assert set(statuses[4:6]) <= {200, 400, 413}
        assert more < 200, f"{more:.0f} MiB more"
        # The largest that are allowed are unpacked one after the other, and answered.
        statuses, more = asked_at_once(client, [largest[number % len(largest)] for number in range(8)], server)
        assert statuses == [200] * 8
        assert more < 500, f"{more:.0f} MiB more"
        assert client.post(PATH, json=question(small)).status_code == 200


def asked_at_once(client: httpx.Client, pictures: Sequence[bytes], server: psutil.Process) -> tuple[list[int], float]:
    """The status of the answer to each, and how many MiB the server's memory grew meanwhile."""
    before = memory = server.memory_info().rss
    with ThreadPoolExecutor(len(pictures)) as pool:
        asked = [pool.submit(client.post, PATH, json=question(data_url(picture))) for picture in pictures]
        while not all(each.done() for each in asked):
            memory = max(memory, server.memory_info().rss)
            time.sleep(0.005)
    return [each.result().status_code for each in asked], (memory - before) / 2**20


def test_the_same_picture_is_opened_once_and_comes_out_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[bytes] = []

    def counting(content: bytes, limits: PictureLimits) -> Image.Image:
        opened.append(content)
        return open_picture(content, limits)

    pictures = SafePictures(DEFAULT_LIMITS, cache_bytes=100_000)
    monkeypatch.setattr("serving.pictures.open_picture", counting)
    noise = Image.effect_noise((40, 30), 80).convert("RGB")
    url = data_url(encoded(noise))
    assert pictures.safe_picture(url) is pictures.safe_picture(url)
    assert pictures.safe_picture(url).url == SafePictures(DEFAULT_LIMITS).safe_picture(encoded(noise)).url
    assert len(opened) == 2
    for number in range(50):
        pictures.safe_picture(data_url(encoded(Image.effect_noise((60, 60), number + 1).convert("RGB"))))
    assert pictures._kept_bytes <= 100_000
    assert sum(picture.size for picture in pictures._kept.values()) == pictures._kept_bytes
    pictures.safe_picture(url)
    assert len(opened) == 2 + 50 + 1, "it was forgotten for newer ones"


@pytest.mark.parametrize(
    ("size", "noise", "kind"), [((41, 30), 80, "bmp"), ((1_200, 900), 80, "bmp"), ((1_200, 900), 0, "png")]
)
def test_every_pixel_reaches_the_engine_and_short_files_do_not_become_long(
    size: tuple[int, int], noise: int, kind: str, tmp_path: Path
) -> None:
    grey = Image.effect_noise(size, noise)
    ramp = Image.linear_gradient("L").resize(size)
    picture = Image.merge("RGB", [grey, ramp, grey.transpose(Image.Transpose.FLIP_TOP_BOTTOM)])
    told = SafePictures(DEFAULT_LIMITS).safe_picture(encoded(picture))
    assert told.url.startswith(f"data:image/{kind};base64,")
    assert open_picture(decode_data_url(told.url)).tobytes() == picture.tobytes()
    as_file = SafePictures(DEFAULT_LIMITS, folder=lambda: tmp_path).safe_picture(encoded(picture))
    [file] = tmp_path.iterdir()
    assert as_file.url == file.as_uri()
    assert file.suffix == f".{kind}"
    assert open_picture(file.read_bytes()).tobytes() == picture.tobytes()


@pytest.mark.parametrize(
    ("image", "format"),
    [
        (Image.new("RGB", (1, 1)), "PNG"),
        (Image.new("RGB", (1, 16_000)), "PNG"),
        (Image.new("CMYK", (20, 20)), "JPEG"),
        (Image.new("LA", (20, 20)), "PNG"),
        (Image.new("P", (20, 20)), "GIF"),
        (Image.new("I;16", (20, 20)), "PNG"),
    ],
)
def test_odd_pictures_are_answered(image: Image.Image, format: str, client: httpx.Client) -> None:
    assert client.post(PATH, json=question(data_url(encoded(image, format)))).status_code == 200


@pytest.mark.parametrize(
    "content",
    [b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7\n", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"SIMPLE  =    T",
     b"<!doctype html><script>alert(1)</script>", b"II*\x00" + bytes(64)],
)  # fmt: skip
def test_other_formats_are_415_whatever_they_call_themselves(content: bytes, client: httpx.Client) -> None:
    answer = client.post(PATH, json=question(data_url(content)))
    assert_refused(answer)
    assert answer.status_code == 415


# -- Bodies ------------------------------------------------------------------------------------------------------------


def said(content: object) -> bytes:
    """A request in which a user says `content`."""
    return json.dumps({"model": "joey", "messages": [{"role": "user", "content": content}]}).encode()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[1]",
        b"\xff\xfe\x00",
        b'{"model": "joey", "messages": [{"role": "user", "content": "\xff"}]}',
        b'{"model": "joey", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"model": "joey", "messages": [{"role": "user", "content": "x"}], "temperature": -Infinity}',
        b'{"model": "joey", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1e400}',
        b'{"model": "joey", "messages": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
        b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
        said("\udfff"),
        said("x" * 2_000_000),
        json.dumps(question("x") | {"stop": ["x"] * 10_000}).encode(),
        json.dumps(question("x") | {"max_tokens": 10**9, "n": 10**6}).encode(),
        json.dumps(json.loads(said("x")) | {"structured_outputs": {"json": {"const": "\udfff"}}}).encode(),
        said([{"type": "image_url"}]),
        said([{"type": "image_url", "image_url": {}}]),
        said([{"type": "image_url", "image_url": None}]),
    ],
    ids=range(17),
)  # fmt: skip
def test_bad_bodies_are_refused(body: bytes, client: httpx.Client, engine: SmallEngine) -> None:
    engine.seen.clear()
    assert_refused(client.post(PATH, content=body, headers={"Content-Type": "application/json"}))
    assert engine.seen == []


# What vLLM 0.32 says where xgrammar cannot compile a form, or no token is left that fits it.
FAILED = Fault(500, {"error": {"message": "Internal server error", "type": "InternalServerError", "code": 500}})
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string", "minLength": -2}}}


@pytest.mark.parametrize(
    ("form", "status"),
    [
        ({"response_format": FORM}, 400),
        ({"structured_outputs": {"regex": r"[^\s\S]"}}, 400),
        ({"response_format": {"type": "text"}}, 503),
        ({}, 503),
    ],
)
def test_a_form_that_the_engine_fails_on_is_the_request_s_fault(
    form: dict[str, Any], status: int, facts: ModelFacts
) -> None:
    body = {"model": "joey", "messages": [{"role": "user", "content": "What?"}]} | form
    with (
        faulty_server(lambda question, tries: FAILED, models=("joey",)) as server,
        served(create_gateway(RemoteEngine(server.url.removesuffix("/v1")), "joey", facts)) as address,
    ):
        answer = httpx.post(address + PATH, json=body, timeout=60, trust_env=False)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert ("cannot be fulfilled" in error["message"]) == (status == 400)
    assert error["type"] == ("invalid_request_error" if status == 400 else "server_error")


def test_a_body_of_64_megabytes_is_refused_whether_it_says_its_size_or_not(client: httpx.Client) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(64):
            yield bytes(2**20)

    headers = {"Content-Type": "application/json"}
    for content in (bytes(64 * 2**20), pieces()):
        # The server may hang up while the client still sends.
        with contextlib.suppress(httpx.WriteError, httpx.RemoteProtocolError, httpx.ReadError):
            answer = client.post(PATH, content=content, headers=headers)
            assert answer.status_code == 413
    assert client.post(PATH, json=question(data_url(encoded(Image.new("RGB", (8, 8)))))).status_code == 200
