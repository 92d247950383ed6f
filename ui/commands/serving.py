"""Commands that run a server: the page with the API, or the API alone."""

import os
import signal
import tempfile
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ui.commands.shared import ModelArgument, plain_errors

if TYPE_CHECKING:
    import fastapi

PANEL = "Chat and serve"
commands = typer.Typer()


LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}
HostOption = Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")]


@commands.command(rich_help_panel=PANEL, epilog="Example: kangaroo chat --open")
def chat(
    model: ModelArgument = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the page and the API.")] = 7860,
    host: HostOption = "127.0.0.1",
    open_page: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in the browser.")] = False,
) -> None:
    """Chat about pictures in the browser; the API is there too, under /v1."""
    with tempfile.TemporaryDirectory(prefix="kangaroo-") as uploads:
        # What visitors upload goes away with the server. Gradio reads this when it is imported.
        os.environ["GRADIO_TEMP_DIR"] = uploads
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        run_server(model, host, port, with_page=True, open_page=open_page)


@commands.command(rich_help_panel=PANEL, epilog="Example: kangaroo serve --port 8000")
def serve(
    model: ModelArgument = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the API.")] = 8000,
    host: HostOption = "127.0.0.1",
) -> None:
    """Serve the OpenAI-compatible API, without the page."""
    run_server(model, host, port, with_page=False)


def run_server(model: str | None, host: str, port: int, with_page: bool, open_page: bool = False) -> None:
    """Runs engine and gateway, with the page where wanted, until Ctrl-C; exit code 130 then."""
    from assistant.models import ModelError, find_model

    with plain_errors(ModelError):
        folder = find_model(model)
    name = folder.name if model is None or Path(model).exists() else model

    from serving.gateway import serve as serve_gateway

    def attach(gateway: "fastapi.FastAPI") -> "fastapi.FastAPI":
        from ui.browser.chat import attach_page, build_page

        address = f"http://{bracketed(LOOPBACK.get(host, host))}:{port}"
        attach_page(gateway, build_page(f"{address}/v1", api_key=None, model_name=name))
        if open_page:
            # The port listens already, so that the browser waits for the page instead of finding nothing there.
            webbrowser.open(address)
        return gateway

    interrupted = remembered_interrupt()
    code = serve_gateway(folder, name, host, port, attach=attach if with_page else None)
    raise typer.Exit(130 if interrupted() else code)


def remembered_interrupt() -> Callable[[], bool]:
    """Remembers whether Ctrl-C came: the server ends in order then, and returns as if nobody had pressed it."""
    pressed = False

    def interrupt(number: int, frame: object) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    return lambda: pressed


def bracketed(host: str) -> str:
    """An IPv6 address as it stands in a URL."""
    return f"[{host}]" if ":" in host else host
