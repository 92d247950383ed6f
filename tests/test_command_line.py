"""The command `kangaroo` as people run it: help, real answers, and one clear line for everything that can be wrong."""

import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image

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
