"""`kangaroo caption FOLDER --out FILE` goes on after any stop, keeps a line for each picture once, and loses none."""

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from PIL import Image

from assistant.images import PictureError
from assistant.models import JOEY
from assistant.questions import CaptionStyle
from serving.engine import LocalEngine
from tests.test_command_line import KANGAROO, kangaroo
from training.data.caption_files import CaptionedPictures
from training.data.scenes import EVALUATION_SEED, make_scene
from ui.caption_file import CaptionFile, CaptionFileError
from ui.captioning import CaptionServer, ServerError, caption_files
from ui.commands.asking import Style

COUNT = 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Scenes, some in a folder below."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for number in range(COUNT):
        path = folder / ("more" if number % 3 == 0 else "") / f"{number:02}.png"
        make_scene(EVALUATION_SEED + number).image.save(path)
    return folder


def command(engine: LocalEngine, folder: Path, *words: str | Path) -> list[str | Path]:
    out = folder / "captions.jsonl"
    return ["caption", folder, "--out", out, "--engine-url", engine.base_url, "--api-key", str(engine.api_key), *words]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]


def assert_each_once(folder: Path) -> None:
    """Every picture of the folder has its one line, with words in it."""
    images = [line["image"] for line in lines(folder)]
    assert sorted(images) == sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    assert all(line["caption"].strip() for line in lines(folder))


def wait_for_lines(folder: Path, count: int, running: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 200
    out = folder / "captions.jsonl"
    while not out.exists() or out.read_bytes().count(b"\n") < count:
        assert running.poll() is None, "it ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_stopped_goes_on(stop: signal.Signals, joey_engine: LocalEngine, folder: Path) -> None:
    words = [KANGAROO, *command(joey_engine, folder, "--at-once", "2")]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as running:
        wait_for_lines(folder, 8, running)
        running.send_signal(stop)
        _, told = running.communicate(timeout=60)
    assert running.returncode == (-signal.SIGKILL if stop is signal.SIGKILL else 130)
    if stop is signal.SIGINT:
        assert "The same command goes on" in told
        assert "Traceback" not in told
    before = (folder / "captions.jsonl").read_bytes()
    kept = before.count(b"\n")
    assert 8 <= kept < COUNT
    done = kangaroo(*command(joey_engine, folder))
    assert done.returncode == 0, done.stderr
    assert f"{COUNT} of {COUNT} pictures have their captions" in done.stderr
    assert f"{COUNT - kept} of them new" in done.stderr
    assert_each_once(folder)
    whole = before[: before.rindex(b"\n") + 1]
    assert (folder / "captions.jsonl").read_bytes().startswith(whole), "lines that were there were touched"
    again = kangaroo(*command(joey_engine, folder))
    assert "0 of them new" in again.stderr


def test_damaged_pictures_are_named_and_counted(joey_engine: LocalEngine, folder: Path) -> None:
    (folder / "text.png").write_text("no picture")
    (folder / "cut.png").write_bytes((folder / "01.png").read_bytes()[:300])
    done = kangaroo(*command(joey_engine, folder))
    assert done.returncode == 1
    assert f"2 of {COUNT + 2} pictures could not be captioned" in done.stderr
    for name in ("text.png", "cut.png"):
        assert str(folder / name) in done.stderr
        (folder / name).unlink()
    assert_each_once(folder)


def test_changed_moved_and_equal_pictures(joey_engine: LocalEngine, folder: Path) -> None:
    server = CaptionServer(joey_engine.base_url, joey_engine.api_key, None, "short")
    assert server.model == JOEY.name
    paths = sorted(folder.glob("*.png"))[:4]
    with CaptionFile(folder / "captions.jsonl", server.model, "short") as kept:
        assert all(done.is_new for done in caption_files(paths, server, kept, at_once=4))
        first = {line["image"]: line["caption"] for line in lines(folder)}
        # The first becomes a copy of the second, and the third moves: what they show is known already.
        paths[0].write_bytes(paths[1].read_bytes())
        moved = paths[2].rename(folder / "moved.png")
        done = list(caption_files([paths[0], moved, paths[3], paths[3]], server, kept, at_once=1))
        assert not any(each.is_new for each in done)
    captions = {line["image"]: line["caption"] for line in lines(folder)}
    assert len(captions) == len(lines(folder)) == 5
    assert captions[paths[0].name] == first[paths[1].name]
    assert captions["moved.png"] == first[paths[2].name]


def test_training_reads_the_captions(joey_engine: LocalEngine, folder: Path) -> None:
    assert kangaroo(*command(joey_engine, folder)).returncode == 0
    pictures = CaptionedPictures(folder / "captions.jsonl")
    assert len(pictures.files) == COUNT


def test_a_server_that_is_not_there(folder: Path) -> None:
    words: list[str | Path] = ["caption", folder, "--out", folder / "captions.jsonl"]
    done = kangaroo(*words, "--engine-url", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert "http://127.0.0.1:9 does not answer" in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(ServerError, match="no address of a server"):
        CaptionServer("http://localhost:port", None, None, "short")
    with pytest.raises(ServerError, match="does not answer"):
        CaptionServer("localhost:8000", None, None, "short")


def test_a_wrong_key_is_told(joey_engine: LocalEngine) -> None:
    with pytest.raises(ServerError, match="refuses \\(401\\)"):
        CaptionServer(joey_engine.base_url, "wrong", None, "short")


def test_a_picture_that_the_server_refuses_is_the_picture_s_fault(joey_engine: LocalEngine, folder: Path) -> None:
    server = CaptionServer(joey_engine.base_url, joey_engine.api_key, JOEY.name, "short")
    with pytest.raises(PictureError, match=r"a\.png: not a picture"):
        server.caption(b"nothing", "a.png")
    missing = CaptionServer(joey_engine.base_url, joey_engine.api_key, "other", "short")
    with pytest.raises(ServerError, match="refuses \\(404\\)"):
        missing.caption((folder / "01.png").read_bytes(), "01.png")


@pytest.mark.slow
def test_it_starts_an_engine_of_its_own(folder: Path) -> None:
    done = kangaroo("caption", folder, "--out", folder / "captions.jsonl", seconds=600)
    assert done.returncode == 0, done.stderr
    assert_each_once(folder)


# -- The file, and what needs no engine --------------------------------------------------------------------------------


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    out = tmp_path / "captions.jsonl"
    with CaptionFile(out, "joey", "short") as kept:
        kept.add(tmp_path / "a.png", "1" * 64, "A wombat, naïve.")
        kept.add(tmp_path / "b.png", "2" * 64, "Two\nlines.")
    yield out


@pytest.mark.parametrize("half", ['{"image": "c.png", "capt', '{"im', '{"image": "c.png", "caption": "whole", "sha'])
def test_half_a_line_is_cut_off(half: str, out: Path) -> None:
    whole = out.read_bytes()
    out.write_bytes(whole + half.encode())
    with CaptionFile(out, "joey", "short") as kept:
        assert len(kept) == 2
        assert out.read_bytes() == whole
        kept.add(out.parent / "c.png", "3" * 64, "Third.")
    assert [json.loads(line)["image"] for line in out.read_text().splitlines()] == ["a.png", "b.png", "c.png"]


@pytest.mark.parametrize(
    "content", [b"my diary", b"my diary\n", b"{}\n", b"[1]\n", b"\xff\xd8\xff\n\x00", b'{"image": 1}\n']
)
def test_another_s_file_is_left_alone(content: bytes, tmp_path: Path) -> None:
    out = tmp_path / "other"
    out.write_bytes(content)
    with pytest.raises(CaptionFileError, match="choose another --out"):
        CaptionFile(out, "joey", "short")
    assert out.read_bytes() == content


@pytest.mark.parametrize(("model", "style"), [("other", "short"), ("joey", "detailed")])
def test_captions_of_another_model_or_style_are_not_mixed(model: str, style: str, out: Path) -> None:
    with pytest.raises(CaptionFileError, match="made by joey in style short"):
        CaptionFile(out, model, style)


def test_two_programs_do_not_write_one_file(out: Path) -> None:
    with CaptionFile(out, "joey", "short"), pytest.raises(CaptionFileError, match="another program writes to it"):
        CaptionFile(out, "joey", "short")
    with CaptionFile(out, "joey", "short") as kept:
        kept.add(out.parent / "a.png", "4" * 64, "A changed picture.")
        # Written anew, and still locked.
        with pytest.raises(CaptionFileError, match="another program writes to it"):
            CaptionFile(out, "joey", "short")
    assert [json.loads(line)["sha256"][0] for line in out.read_text().splitlines()] == ["2", "4"]


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CaptionFileError, match="cannot be written"):
        CaptionFile(tmp_path / "file" / "captions.jsonl", "joey", "short")


def test_the_command_s_styles_are_the_library_s() -> None:
    assert get_args(Style) == get_args(CaptionStyle)


def test_a_folder_without_pictures_and_a_server_without_a_file(tmp_path: Path) -> None:
    done = kangaroo("caption", tmp_path, "--out", tmp_path / "captions.jsonl")
    assert done.returncode == 1
    assert "no picture below" in done.stderr
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    done = kangaroo("caption", tmp_path / "a.png", "--engine-url", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert "--engine-url goes with --out" in done.stderr
    assert not (tmp_path / "captions.jsonl").exists()
