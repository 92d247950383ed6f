"""Commands that answer here in the process, without a server."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ui.commands.shared import ModelOption, PicturesArgument, fail, plain_errors, tell

if TYPE_CHECKING:
    from PIL.Image import Image

PANEL = "Chat and serve"
commands = typer.Typer()


CAPTION_BATCH = 8


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


@commands.command(rich_help_panel=PANEL, epilog="Example: kangaroo caption holiday/*.jpg")
def caption(images: PicturesArgument, model: ModelOption = None) -> None:
    """Describe each picture in one line; a picture that cannot be read is named and the rest go on."""
    captioner: Callable[[Sequence[Image]], list[str]] | None = None
    unread = 0
    for start in range(0, len(images), CAPTION_BATCH):
        opened = open_readable(images[start : start + CAPTION_BATCH])
        unread += len(images[start : start + CAPTION_BATCH]) - len(opened)
        if not opened:
            continue
        captioner = captioner or load_captioner(model)
        for (path, _), text in zip(opened, captioner([picture for _, picture in opened]), strict=True):
            print(f"{path}: {' '.join(text.split())}", flush=True)
    if unread:
        raise fail(f"{unread} of {len(images)} pictures could not be read.")


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


def load_captioner(model: str | None) -> "Callable[[Sequence[Image]], list[str]]":
    """A function that captions a batch of pictures; ends the command when the model cannot be loaded."""
    from assistant.answering import Assistant, Request
    from assistant.models import ModelError
    from assistant.questions import CAPTION_QUESTION

    with plain_errors(ModelError):
        assistant = Assistant.load(model)
    return lambda pictures: assistant.answer_batch([Request(CAPTION_QUESTION, (picture,)) for picture in pictures])
