"""Commands for the keys that open a server: make one, list them, revoke one."""

from pathlib import Path
from typing import Annotated

import typer

from ui.commands.shared import KeysOption, plain_errors, tell

PANEL = "Chat and serve"
commands = typer.Typer()
key = typer.Typer(
    help="Make, list and revoke the keys of the server. Once there is one, every route but /health wants a key.",
    no_args_is_help=True,
)
commands.add_typer(key, name="key", rich_help_panel=PANEL)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is; it stands in the log.")]


@key.command(epilog="Example: kangaroo key new ann --requests-a-minute 60 --pictures-a-day 500")
def new(
    name: NameArgument,
    requests_a_minute: Annotated[int | None, typer.Option(min=1, help="Requests in any minute.")] = None,
    running: Annotated[int | None, typer.Option(min=1, help="Requests at one time.")] = None,
    tokens_a_day: Annotated[int | None, typer.Option(min=1, help="Tokens read and written in a day (UTC).")] = None,
    pictures_a_day: Annotated[int | None, typer.Option(min=1, help="Pictures in a day (UTC).")] = None,
    keys: KeysOption = None,
) -> None:
    """Make a key and print it; it is shown this once, and kept as a hash. Limits that are not given are none."""
    from serving.keys import KeyFileError, KeyLimits, default_key_file, new_key

    limits = KeyLimits(
        requests_a_minute=requests_a_minute,
        running=running,
        tokens_a_day=tokens_a_day,
        pictures_a_day=pictures_a_day,
    )
    file = keys or default_key_file()
    with plain_errors(KeyFileError):
        text = new_key(file, name, limits)
    print(text)
    tell(f"this is the only time that the key is shown. {file} holds its hash; a server that has no keys yet wants "
         "them from its next start.")  # fmt: skip


@key.command("list", epilog="Example: kangaroo key list")
def list_keys(keys: KeysOption = None) -> None:
    """List the keys: name, day they were made, limits."""
    from rich.console import Console
    from rich.table import Table

    from serving.keys import KeyFileError, KeyLimits, default_key_file, read_keys

    with plain_errors(KeyFileError):
        found = read_keys(keys or default_key_file())
    limits = list(KeyLimits.model_fields)
    table = Table("name", "made", *(limit.replace("_", " ") for limit in limits))
    for each in found:
        table.add_row(
            each.name, f"{each.created:%Y-%m-%d}", *(str(getattr(each.limits, name) or "-") for name in limits)
        )
    Console().print(table)


@key.command(epilog="Example: kangaroo key revoke ann")
def revoke(name: NameArgument, keys: KeysOption = None) -> None:
    """Revoke a key: a running server refuses it within a second."""
    from serving.keys import KeyFileError, default_key_file, read_keys, revoke_key

    file: Path = keys or default_key_file()
    with plain_errors(KeyFileError):
        revoke_key(file, name)
        left = len(read_keys(file))
    nobody = f" Nobody can come in now; a server that finds no {file} when it starts asks for no key."
    tell(f"{name} is revoked; {left} keys are left." + ("" if left else nobody))
