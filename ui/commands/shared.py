"""What commands share: errors in one line, and the options that several of them take."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[
    str | None,
    typer.Argument(metavar="[MODEL]", help="A model folder or a hub name (organisation/name).", show_default="Joey"),
]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="A model folder or a hub name (organisation/name).", show_default="Joey")
]
KeysOption = Annotated[
    Path | None,
    typer.Option("--keys", metavar="FILE", help="The file of keys.", show_default="~/.local/share/kangaroo/keys.json"),
]
GOES_ON = "stopped. The same command goes on from the newest checkpoint."
PicturesArgument = Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Picture files.", show_default=False)]


@contextmanager
def plain_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Ends the command with one line on standard error and exit code 1 where an error of these kinds comes up."""
    try:
        yield
    except kinds as error:
        raise fail(str(error)) from error


@contextmanager
def stopping(message: str) -> Iterator[None]:
    """Ends the command with `message` on standard error and exit code 130, a shell's own, at Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        tell(message)
        raise typer.Exit(130) from None


def fail(message: str) -> typer.Exit:
    """Says what is wrong on standard error, and gives the exception that ends the command with exit code 1."""
    tell(message)
    return typer.Exit(1)


def tell(message: str) -> None:
    """Prints one line on standard error, not wrapped and not coloured, so that it can be searched and parsed."""
    print(f"kangaroo: {message}", file=sys.stderr, flush=True)
