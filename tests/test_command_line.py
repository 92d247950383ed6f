"""The command `kangaroo` as people run it: help, real answers, and one clear line for everything that can be wrong."""

import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from PIL import Image

from assistant.answering import Assistant, Request
from assistant.images import open_picture

KANGAROO = Path(sys.executable).with_name("kangaroo")
COMMANDS = ("chat", "serve", "ask", "caption")
# Nothing listens there: a hub that cannot be reached, whatever network the machine has.
NO_NETWORK = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}


def kangaroo(*words: str | Path, seconds: float = 240) -> subprocess.CompletedProcess[str]:
    """Runs the installed command, in a terminal of 200 columns and with no network to any model hub."""
    environment = os.environ | NO_NETWORK | {"COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run(
        [KANGAROO, *map(str, words)], capture_output=True, text=True, timeout=seconds, env=environment, check=False
    )


def assert_refused(done: subprocess.CompletedProcess[str], *said: str) -> None:
    """The command failed, and standard error says why in so many words, without a trace."""
    assert done.returncode not in (0, -signal.SIGSEGV), done.stdout
    assert "Traceback" not in done.stderr
    for words in said:
        assert words in done.stderr
    assert done.stdout == ""


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    Image.new("RGB", (64, 48), "red").save(path)
    return path


def huge_png(path: Path, side: int = 30_000) -> Path:
    """A whole PNG of side x side black pixels, one bit each: 14 kB that would unpack to 2.7 GB of RGB."""
    deflate = zlib.compressobj(9)
    rows = b"".join(deflate.compress(bytes(1 + side // 8) * 100) for _ in range(side // 100)) + deflate.flush()
    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    chunks = [(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks:
        content += len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    path.write_bytes(content)
    return path


def test_help_names_every_command() -> None:
    done = kangaroo("--help")
    assert done.returncode == 0
    for command in COMMANDS:
        assert command in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_teaches_by_example(command: str) -> None:
    done = kangaroo(command, "--help")
    assert done.returncode == 0
    assert f"Example: kangaroo {command}" in done.stdout
    assert "Joey" in done.stdout


def test_the_command_line_loads_nothing_slow() -> None:
    slow = ("torch", "transformers", "gradio", "vllm", "fastapi", "PIL", "openai")
    program = f"import sys, ui.command_line; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_command_is_refused() -> None:
    assert_refused(kangaroo("jump"), "jump")


@pytest.mark.parametrize("command", ["ask", "caption"])
def test_a_bad_picture_is_named_before_any_model_is_loaded(command: str, picture: Path, tmp_path: Path) -> None:
    text, cut = tmp_path / "text.png", tmp_path / "cut.png"
    text.write_text("<html>no picture</html>")
    Image.effect_noise((200, 200), 60).save(cut)
    cut.write_bytes(cut.read_bytes()[:-2000])
    faults = {
        tmp_path / "missing.png": "no such file",
        tmp_path: "folder",
        text: "PNG, JPEG, WebP, GIF or BMP",
        cut: "damaged or cut off",
        huge_png(tmp_path / "huge.png"): "too many pixels",
    }
    for path, reason in faults.items():
        words = [path, "What is this?"] if command == "ask" else [path]
        # A model that cannot be loaded would be complained about, were it looked at.
        assert_refused(kangaroo(command, *words, "--model", tmp_path / "nowhere"), str(path), reason)


@pytest.mark.parametrize("question", ["", "  \n"])
def test_an_empty_question_is_refused(question: str, picture: Path) -> None:
    assert_refused(kangaroo("ask", picture, question), "the question is empty")


def test_a_forgotten_question_is_asked_for(picture: Path) -> None:
    assert_refused(kangaroo("ask", picture), "Missing argument")
    assert_refused(kangaroo("ask", picture, picture), "the question comes last")


@pytest.mark.parametrize("command", ["ask", "serve", "chat"])
def test_a_model_folder_that_lacks_a_file_is_refused(command: str, picture: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llava"}')
    words = [picture, "What is this?", "--model", folder] if command == "ask" else [folder]
    assert_refused(kangaroo(command, *words), str(folder))


@pytest.mark.parametrize("command", ["ask", "serve"])
def test_a_hub_name_without_a_network_says_so(command: str, picture: Path) -> None:
    name = "some-org/some-model"
    words = [picture, "What is this?", "--model", name] if command == "ask" else [name]
    assert_refused(kangaroo(command, *words), name, "network")


def test_ask_answers_as_the_model_does(picture: Path, tiny_model: Path) -> None:
    done = kangaroo("ask", picture, picture, " What is this? ", "--model", tiny_model, "--max-tokens", "12")
    assert done.returncode == 0, done.stderr
    opened = open_picture(picture)
    request = Request("What is this?", (opened, opened))
    assert done.stdout.strip() == Assistant.load(tiny_model).answer_batch([request], max_new_tokens=12)[0]


def test_caption_goes_on_after_a_bad_picture(picture: Path, tiny_model: Path, tmp_path: Path) -> None:
    bad, last = tmp_path / "bad.png", tmp_path / "last.jpg"
    bad.write_bytes(b"no picture")
    Image.new("RGB", (50, 50), "blue").save(last)
    done = kangaroo("caption", picture, bad, last, "--model", tiny_model)
    assert done.returncode == 1
    captions = [line.partition(": ") for line in done.stdout.splitlines()]
    assert [path for path, _, _ in captions] == [str(picture), str(last)]
    assert all(text for _, _, text in captions)
    assert str(bad) in done.stderr
    assert "1 of 3 pictures could not be read" in done.stderr


@pytest.mark.parametrize("command", ["chat", "serve"])
def test_a_port_in_use_is_refused(command: str, tiny_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_refused(kangaroo(command, tiny_model, "--port", str(port)), str(port), "--port")


def test_chat_shows_its_page_while_the_engine_loads_and_ends_on_ctrl_c(tiny_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    words = [str(KANGAROO), "chat", str(tiny_model), "--port", str(port)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as chat:
        try:
            page = wait_for_page(address, 120)
            assert "<title>Kangaroo</title>" in page or '"title":"Kangaroo"' in page
            state = httpx.get(f"{address}/health", timeout=10).json()["engine"]["state"]
            assert state in ("loading", "ready")
            started = psutil.Process(chat.pid).children(recursive=True)
            assert started, "no engine was started"
            chat.send_signal(signal.SIGINT)
            printed, complaints = chat.communicate(timeout=60)
        finally:
            chat.kill()
    assert chat.returncode == 130, complaints
    assert address in printed
    assert "Traceback" not in complaints
    assert psutil.wait_procs(started, timeout=10)[1] == [], "the engine outlived the command"


def wait_for_page(address: str, seconds: float) -> str:
    """The page at `address`, once it is there."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            answer = httpx.get(address, timeout=10)
        except httpx.TransportError:
            assert time.monotonic() < deadline, f"no page at {address} within {seconds} s"
            time.sleep(0.2)
        else:
            assert answer.status_code == 200
            return answer.text


def test_train_refuses_what_it_cannot_run_before_it_starts(tmp_path: Path) -> None:
    """An unknown recipe names the shipped ones; missing data name the way out; nothing is left behind."""
    runs = tmp_path / "runs"
    assert_refused(kangaroo("train", "jeoy", "--runs", runs), "no recipe jeoy", "joey", "scenes")
    assert_refused(
        kangaroo("train", "joey", "--runs", runs, "--data", tmp_path), "caltech101-train-00.parquet", "--data"
    )
    assert_refused(kangaroo("train", "scenes", "--runs", runs, "--stage", "tune"), "no stage 'tune'", "instruct")
    assert not runs.exists()


def test_train_stops_at_ctrl_c_and_goes_on(tmp_path: Path) -> None:
    """Ctrl-C in the middle ends with code 130 and one line; the same command finishes what was begun."""
    words = ("train", "scenes", "--rehearse", "--runs", str(tmp_path / "runs"))
    process = subprocess.Popen([KANGAROO, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("[1/")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 130 and "goes on" in said and "Traceback" not in said
    done = kangaroo(*words, "--stage", "tokenizer")
    assert done.returncode == 0, done.stderr
    assert f"The result is in {tmp_path / 'runs' / 'scenes-rehearsal' / 'tokenizer' / 'output'}" in done.stdout
    assert (tmp_path / "runs" / "scenes-rehearsal" / "tokenizer" / "output" / "tokenizer.json").is_file()


def test_ctrl_c_while_a_tokenizer_reads_its_texts_stays_ctrl_c(tmp_path: Path) -> None:
    """sentencepiece would make an error of its own of it, and the command a traceback of that."""
    from training.tokenizer import train_sentencepiece

    def interrupted() -> Iterator[str]:
        yield "a text"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_sentencepiece(interrupted(), 300, tmp_path / "tokenizer.model")
