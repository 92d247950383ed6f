"""Pictures that the engine reads as files: there while somebody needs them, for nobody else, and gone afterwards."""

import base64
import random
import stat
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import ExifTags, Image

import serving.engine_pictures
from assistant.images import DEFAULT_LIMITS, encode_data_url, open_picture
from assistant.models import JOEY
from serving.engine import LocalEngine
from serving.engine_pictures import new_picture_folder
from serving.gateway import create_gateway
from serving.model_folder import read_model_folder
from serving.pictures import SafePictures
from tests.conftest import MODEL_NAME, served
from tests.small_engine import SmallEngine, small_engine
from tests.test_engine import wait_until
from tests.test_threats import assert_refused, encoded, mutated

BITMAP_HEADER = 54  # bytes


def noise(number: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Another picture for each number, and always the same."""
    width, height = size
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8))


def question_about(url: str, model: str) -> dict[str, Any]:
    """A chat about one picture."""
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
    return {"model": model, "messages": [{"role": "user", "content": parts}]}


def test_a_file_lasts_until_all_have_let_go_of_its_picture(tmp_path: Path) -> None:
    one_bitmap = 3 * 40 * 30 + BITMAP_HEADER
    pictures = SafePictures(DEFAULT_LIMITS, folder=lambda: tmp_path, cache_bytes=one_bitmap)
    first = pictures.safe_picture(encoded(noise(0)))
    assert pictures.safe_picture(encoded(noise(0))) is first
    [its_file] = tmp_path.iterdir()
    assert first.url == its_file.as_uri()
    assert first.size == its_file.stat().st_size == one_bitmap
    second = pictures.safe_picture(encoded(noise(1)))
    first.let_go()
    assert set(tmp_path.iterdir()) == {its_file, Path(second.url.removeprefix("file://"))}, "the first is still held"
    first.let_go()
    assert not its_file.exists()
    second.let_go()
    assert [file.as_uri() for file in tmp_path.iterdir()] == [second.url], "the latest is remembered"
    pictures.safe_picture(encoded(noise(2))).let_go()
    assert second.url not in [file.as_uri() for file in tmp_path.iterdir()]


def test_another_engine_reads_in_a_folder_of_its_own(tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    pictures = SafePictures(DEFAULT_LIMITS, folder=lambda: folders[0])
    content = encoded(noise(0))
    assert Path(pictures.safe_picture(content).url.removeprefix("file://")).parent == folders[0]
    folders.reverse()
    assert Path(pictures.safe_picture(content).url.removeprefix("file://")).parent == folders[0]


def test_memory_that_others_need_is_left_to_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert new_picture_folder(tmp_path / "no such place") is None
    folder = new_picture_folder(tmp_path)
    assert folder is not None
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    pictures = SafePictures(DEFAULT_LIMITS, folder=lambda: folder)
    assert pictures.safe_picture(encoded(noise(0))).url.startswith("file://")
    monkeypatch.setattr(serving.engine_pictures, "ROOM_FOR_OTHERS", 2**62)
    assert new_picture_folder(tmp_path) is None
    assert pictures.safe_picture(encoded(noise(1))).url.startswith("data:image/bmp;base64,")


def test_a_picture_goes_with_its_request_when_the_folder_is_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "gone"
    pictures = SafePictures(DEFAULT_LIMITS, folder=lambda: folder)
    assert pictures.safe_picture(encoded(noise(0))).url.startswith("data:image/bmp;base64,")
    assert f"cannot be written into {folder}: No such file or directory" in caplog.text


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[SmallEngine]:
    """An engine that is told of files, and waits."""
    with small_engine() as engine:
        engine.picture_folder = tmp_path
        engine.go_on.clear()
        yield engine


@pytest.mark.parametrize("asked", ["chat", "stream", "captions"])
@pytest.mark.parametrize("stays", [True, False])
def test_the_file_is_there_until_the_request_ends(asked: str, stays: bool, reader: SmallEngine, tmp_path: Path) -> None:
    app = create_gateway(reader, JOEY.name, read_model_folder(JOEY))
    app.state.chat_service.pictures._cache_bytes = 0  # nothing is remembered
    with served(app) as address, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, address, asked, 120 if stays else 2)
        wait_until(lambda: bool(reader.seen) or waiting.done(), 60, "the engine was asked")
        [file] = tmp_path.iterdir()
        [message] = reader.seen[0]["messages"]
        assert message["content"][0]["image_url"]["url"] == file.as_uri()
        assert open_picture(file.read_bytes()).tobytes() == noise(0).tobytes()
        if stays:
            time.sleep(0.3)
            assert file.exists()
            reader.go_on.set()
            assert waiting.result().status_code == 200
        else:
            assert isinstance(waiting.exception(), httpx.ReadTimeout)
        wait_until(lambda: not file.exists(), 10, "the file is gone")


def ask(address: str, asked: str, seconds: float) -> httpx.Response:
    """Send a request about one picture, and wait so long for its answer."""
    url = encode_data_url(noise(0))
    body = question_about(url, JOEY.name) | {"stream": asked == "stream"}
    path = "/v1/chat/completions"
    if asked == "captions":
        body, path = {"model": JOEY.name, "pictures": [url]}, "/v1/captions"
    with httpx.Client(base_url=address, timeout=seconds, trust_env=False) as client:
        return client.post(path, json=body)


def test_vllm_reads_the_file(engine: LocalEngine, gateway: httpx.Client) -> None:
    folder = engine.picture_folder
    if folder is None:
        pytest.skip("this machine has little shared memory, so that pictures go within their requests")
    before = set(folder.iterdir())
    picture = noise(7)
    for _ in range(2):
        body = question_about(encode_data_url(picture), MODEL_NAME) | {"max_tokens": 4}
        answer = gateway.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
    [file] = set(folder.iterdir()) - before
    assert open_picture(file.read_bytes()).tobytes() == picture.tobytes()


@pytest.mark.parametrize("count", [60, pytest.param(1_000, marks=pytest.mark.slow)])
def test_what_vllm_cannot_open_is_told_as_if_we_had_opened_it(count: int, gateway: httpx.Client) -> None:
    draw = random.Random(0)
    whole = encoded(noise(3), "JPEG")
    told: Counter[int] = Counter()
    for content in [whole, *(mutated(whole, draw) for _ in range(count)), whole]:
        url = "data:image/jpeg;base64," + base64.b64encode(content).decode()
        answer = gateway.post("/v1/chat/completions", json=question_about(url, MODEL_NAME) | {"max_tokens": 1})
        told[answer.status_code] += 1
        if answer.status_code != 200:
            assert_refused(answer)
            assert answer.status_code in (400, 413, 415)
            assert answer.json()["error"]["param"] == "messages.0.content"
            assert answer.json()["error"]["code"] == "invalid_image"
    assert answer.status_code == 200
    assert told[200] > 1 + count // 10, "flipped bytes make another picture of most"
    assert told[400] > count // 10, "and damage the others"


def test_a_plain_jpeg_is_handed_on_as_it_is_and_others_are_opened() -> None:
    pictures = SafePictures(DEFAULT_LIMITS)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    handed_on = {
        name: pictures.safe_picture(content).url == "data:image/jpeg;base64," + base64.b64encode(content).decode()
        for name, content in {
            "plain": encoded(noise(0), "JPEG"),
            "turned": encoded(noise(0), "JPEG", exif=exif),
            "grey": encoded(noise(0).convert("L"), "JPEG"),
            "large": encoded(noise(0, (2_100, 20)), "JPEG"),
            "PNG": encoded(noise(0)),
        }.items()
    }
    assert handed_on == {"plain": True, "turned": False, "grey": False, "large": False, "PNG": False}


def test_one_damaged_picture_of_two_is_told_beside_the_other(gateway: httpx.Client) -> None:
    whole = encoded(noise(3, (200, 200)), "JPEG")
    urls = ["data:image/jpeg;base64," + base64.b64encode(content).decode() for content in (whole, whole[:-400])]
    answer = gateway.post("/v1/captions", json={"model": MODEL_NAME, "pictures": urls, "max_tokens": 2})
    assert answer.status_code == 200, answer.text
    good, damaged = answer.json()["data"]
    assert good["error"] is None
    assert damaged["error"]["code"] == "invalid_image"
    assert "damaged or cut off" in damaged["error"]["message"]
