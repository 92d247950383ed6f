"""Commands that answer here in the process, without a server."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ui.commands.shared import ModelOption, PicturesArgument, fail, plain_errors, stopping, tell

if TYPE_CHECKING:
    from PIL.Image import Image

    from ui.captioning import CaptionServer

PANEL = "Chat and serve"
commands = typer.Typer()


Style = Literal["short", "detailed", "alt_text"]
CAPTION_BATCH = 8
SECONDS_TO_START = 900.0  # of an engine: a large model's weights take minutes to read


@commands.command(rich_help_panel=PANEL, epilog='Example: kangaroo ask photo.jpg "What is the dog doing?"')
def ask(
    images: PicturesArgument,
    question: Annotated[str, typer.Argument(help="The question, in quotes.", show_default=False)],
    model: ModelOption = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Cut the answer off after so many tokens.")] = 256,
) -> None:
    """Ask about one or more pictures, here in the terminal; no server is needed."""
    from assistant.images import PictureError, open_picture

    if not question.strip():
        raise fail('the question is empty. Example: kangaroo ask photo.jpg "What is the dog doing?"')
    if Path(question).is_file():
        raise fail(f'{question} is a file; the question comes last. Example: kangaroo ask {question} "What is this?"')
    with plain_errors(PictureError):
        pictures = tuple(open_picture(path) for path in images)

    from assistant.answering import Assistant, Request
    from assistant.models import ModelError

    with plain_errors(ModelError):
        assistant = Assistant.load(model)
    for piece in assistant.stream(Request(question.strip(), pictures), max_new_tokens=max_tokens):
        print(piece, end="", flush=True)
    print()


@commands.command(
    rich_help_panel=PANEL,
    epilog="Example: kangaroo caption holiday/*.jpg   or   kangaroo caption holiday --out holiday/captions.jsonl",
)
def caption(
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE", help="Picture files; with --out folders too.", show_default=False)
    ],
    model: ModelOption = None,
    style: Annotated[Style, typer.Option(help="A sentence, all that is to be seen, or words for the blind.")] = "short",
    out: Annotated[
        Path | None,
        typer.Option(help="Write the captions into this file, as JSON lines; the same command goes on after a stop."),
    ] = None,
    engine_url: Annotated[
        str | None, typer.Option(help="With --out: a server that runs already, such as kangaroo serve or vLLM.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="KANGAROO_API_KEY", help="The key of that server.")] = None,
    at_once: Annotated[int, typer.Option(min=1, max=256, help="With --out: pictures asked about at a time.")] = 16,
) -> None:
    """Describe each picture in one line; a picture that cannot be read is named and the rest go on."""
    if out is not None:
        caption_into(out, images, model, style, engine_url, api_key, at_once)
        return
    if engine_url is not None:
        raise fail(
            "--engine-url goes with --out. Example: kangaroo caption holiday --out captions.jsonl --engine-url ..."
        )
    captioner: Callable[[Sequence[Image]], list[str]] | None = None
    unread = 0
    for start in range(0, len(images), CAPTION_BATCH):
        opened = open_readable(images[start : start + CAPTION_BATCH])
        unread += len(images[start : start + CAPTION_BATCH]) - len(opened)
        if not opened:
            continue
        captioner = captioner or load_captioner(model, style)
        for (path, _), text in zip(opened, captioner([picture for _, picture in opened]), strict=True):
            print(f"{path}: {text}", flush=True)
    if unread:
        raise fail(f"{unread} of {len(images)} pictures could not be read.")


def caption_into(
    out: Path,
    images: Sequence[Path],
    model: str | None,
    style: Style,
    engine_url: str | None,
    api_key: str | None,
    at_once: int,
) -> None:
    """Captions files, and those below folders, into `out`, by the server at `engine_url` or an engine of our own."""
    from assistant.models import ModelError, find_model
    from ui.caption_file import CaptionFileError
    from ui.captioning import CaptionServer, ServerError

    files = picture_files(images)
    with plain_errors(ModelError, ServerError, CaptionFileError), stopping("stopped. The same command goes on."):
        if engine_url is not None:
            caption_by(CaptionServer(engine_url, api_key, model, style), files, out, at_once)
            return
        folder = find_model(model)
        name = folder.name if model is None or Path(model).exists() else model
        with own_engine(folder, name) as (address, key):
            caption_by(CaptionServer(address, key, name, style), files, out, at_once)


def picture_files(images: Sequence[Path]) -> list[Path]:
    """The files among `images`, and the pictures below the folders among them, in order and each once."""
    from assistant.picture_files import pictures_below

    found: dict[Path, None] = {}
    for path in images:
        found |= dict.fromkeys(sorted(pictures_below(path)) if path.is_dir() else [path])
    if not found:
        raise fail(f"there is no picture below {', '.join(map(str, images))}")
    return list(found)


@contextmanager
def own_engine(folder: Path, name: str) -> Iterator[tuple[str, str | None]]:
    """Address and key of a vLLM on the model in `folder`, ready; it ends with the command."""
    from rich.console import Console

    from serving.engine import EngineError, LocalEngine

    with plain_errors(EngineError), LocalEngine(folder, name) as engine:
        with Console(stderr=True).status("starting the engine; this takes half a minute"):
            engine.wait_until_ready(SECONDS_TO_START)
        yield engine.base_url, engine.api_key


def caption_by(server: "CaptionServer", files: Sequence[Path], out: Path, at_once: int) -> None:
    """Captions `files` by `server` with a bar on the terminal; exit code 1 where one of them could not be read."""
    from rich.console import Console
    from rich.progress import track

    from ui.caption_file import CaptionFile
    from ui.captioning import caption_files

    asked = unread = 0
    with CaptionFile(out, server.model, server.style) as kept:
        done = caption_files(files, server, kept, at_once)
        for captioned in track(done, "captioning", len(files), console=Console(stderr=True)):
            asked += captioned.is_new
            if captioned.error is not None:
                tell(captioned.error)
                unread += 1
    tell(f"{len(files) - unread:,} of {len(files):,} pictures have their captions in {out}, {asked:,} of them new.")
    if unread:
        raise fail(f"{unread:,} of {len(files):,} pictures could not be captioned.")


def open_readable(paths: Sequence[Path]) -> "list[tuple[Path, Image]]":
    """The pictures that can be read, with their paths; each of the others is named on standard error."""
    from assistant.images import PictureError, open_picture

    opened = []
    for path in paths:
        try:
            opened.append((path, open_picture(path)))
        except PictureError as error:
            tell(str(error))
    return opened


def load_captioner(model: str | None, style: Style) -> "Callable[[Sequence[Image]], list[str]]":
    """A function that captions a batch of pictures; ends the command when the model cannot be loaded."""
    from assistant.answering import Assistant, Request
    from assistant.models import ModelError
    from assistant.questions import CAPTION_STYLES, tidied

    with plain_errors(ModelError):
        assistant = Assistant.load(model)
    words = CAPTION_STYLES[style]

    def caption_batch(pictures: "Sequence[Image]") -> list[str]:
        requests = [Request(words.question, (picture,)) for picture in pictures]
        return [tidied(text, style) for text in assistant.answer_batch(requests, words.max_tokens)]

    return caption_batch
