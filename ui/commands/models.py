"""The command that lists what a running server serves."""

import os
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from ui.commands.shared import fail

PANEL = "Chat and serve"
commands = typer.Typer()
SECONDS_TO_ANSWER = 10.0


@commands.command(rich_help_panel=PANEL, epilog="Example: kangaroo models --url http://gpu:8000")
def models(
    url: Annotated[str, typer.Option(help="Where the server is, with or without /v1.")] = "http://127.0.0.1:8000",
    key_env: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            show_default=False,
            help="The environment variable that holds the key, where one is asked for.",
        ),
    ] = None,
) -> None:
    """List the models of a running server: the base, and the adapters on it that the key may use."""
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "on the base", "of", "made")
    for model in listed(url.rstrip("/").removesuffix("/v1"), key_env):
        made = datetime.fromtimestamp(model["created"], UTC)
        table.add_row(model["id"], model.get("parent") or "-", model["owned_by"], f"{made:%Y-%m-%d %H:%M} UTC")
    Console().print(table)


def listed(address: str, key_env: str | None) -> list[dict[str, Any]]:
    """What `GET /v1/models` there answers. Ends the command where nobody answers, or not so."""
    import httpx

    key = None
    if key_env is not None and not (key := os.environ.get(key_env)):
        raise fail(f"--key-env {key_env}: there is no such environment variable.")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.get(f"{address}/v1/models", headers=headers, timeout=SECONDS_TO_ANSWER, trust_env=False)
    except (httpx.TransportError, httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise fail(f"no server answers at {address} ({error}); `kangaroo serve` starts one.") from error
    if answer.status_code in (401, 403):
        raise fail(f"the server at {address} wants a key: --key-env NAME names the variable that holds it.")
    try:
        data = answer.json()["data"]
    except (ValueError, KeyError, TypeError) as error:
        raise fail(f"what answers at {address} is no server of models (status {answer.status_code}).") from error
    return list(data)
