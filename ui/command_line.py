"""The command `kangaroo`: all commands together; each imports what it needs late, so that help is instant."""

import logging
import warnings
from importlib.metadata import version
from typing import Annotated

import typer

from ui.commands import (
    asking,
    evaluating,
    exporting,
    finding,
    keys,
    models,
    preferring,
    pretraining,
    serving,
    teaching,
    towers,
)

DISTRIBUTION = "kangaroo-assistant"

app = typer.Typer(
    name="kangaroo",
    help="A visual assistant: chat about pictures, serve it, teach it.",
    epilog="Start with: kangaroo chat",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for kind in (serving, keys, models, asking, finding, teaching, preferring, exporting, pretraining, evaluating, towers):
    app.add_typer(kind.commands)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"kangaroo {version(DISTRIBUTION)}")
        raise typer.Exit


@app.callback()
def kangaroo(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """A visual assistant: chat about pictures, serve it, teach it."""


def main() -> None:
    """The entry point of the command `kangaroo`."""
    _leave_out_what_helps_nobody()
    app(prog_name="kangaroo")


def _leave_out_what_helps_nobody() -> None:
    # Told at each start of a machine without a GPU: that another package would make 4-bit weights quicker there.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Told at each load of a SigLIP: that token ids in transformers' own defaults of it lie outside their vocabulary.
    logging.getLogger("transformers.configuration_utils").addFilter(_is_of_a_model)
    # Told where a recipe reads with more processes than there are cores, twice: they take turns.
    warnings.filterwarnings("ignore", "This DataLoader will create")


def _is_of_a_model(record: logging.LogRecord) -> bool:
    return "(between 0 and 31999), got 4940" not in record.getMessage()


if __name__ == "__main__":
    main()
