"""Commands that run a server: the page with the API, or the API alone."""

import os
import signal
import tempfile
import webbrowser
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ui.commands.shared import KeysOption, ModelArgument, plain_errors, tell

if TYPE_CHECKING:
    import fastapi

    from serving.adapters import AdapterPlaces
    from serving.doors import Doors
    from serving.engine import Engine
    from serving.jobs.data_folder import DataFolder
    from serving.model_folder import ModelFacts
    from serving.pictures import RemoteHosts

PANEL = "Chat and serve"
commands = typer.Typer()


LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}
HostOption = Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")]
NameOption = Annotated[
    str | None, typer.Option(help="What clients call the model.", show_default="the folder's or hub's name")
]
OriginsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-origin", metavar="URL", show_default=False,
        help="Let pages of this origin (https://host) use the API, and let this server go by its name. Repeatable.",
    ),
]  # fmt: skip
PictureHostsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-pictures-from", metavar="HOST", show_default=False,
        help="Fetch pictures that requests name by https from this host; none by default. Repeatable.",
    ),
]  # fmt: skip
ContentOption = Annotated[
    bool, typer.Option("--log-content", help="Write what is asked and answered into the log; never the pictures.")
]
DataFolderOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER", show_default="~/.local/share/kangaroo",
        help="Where uploaded files, fine-tuning jobs and their models outlive the server.",
    ),
]  # fmt: skip
AdaptersOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER", show_default=False,
        help="Serve each adapter in this folder by its folder's name, and let requests load what is put there later.",
    ),
]  # fmt: skip
AdapterOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=FOLDER", show_default=False, help="Serve this adapter by that name. Repeatable."),
]
UrlOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL", show_default=False,
        help="Use a vLLM that runs there already. MODEL is then the folder of the model that it serves: tokenizer, "
        "chat template and context length are read here. It must serve it by the name that clients use (--name).",
    ),
]  # fmt: skip
EngineKeyOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", show_default=False, help="The environment variable that holds that vLLM's key."),
]
EngineArgumentsOption = Annotated[
    str, typer.Option("--engine-args", metavar="FLAGS", show_default=False, help="Further flags for vLLM, in quotes.")
]


@dataclass(frozen=True)
class Options:
    """What both commands take alike."""

    model: str | None
    name: str | None
    host: str
    port: int
    keys: Path | None
    origins: list[str] | None
    picture_hosts: list[str] | None
    log_content: bool
    data_folder: Path | None
    engine_url: str | None
    engine_key_env: str | None
    engine_arguments: str
    adapters: Path | None
    named_adapters: list[str] | None


@commands.command(rich_help_panel=PANEL, epilog="Example: kangaroo chat --open")
def chat(
    model: ModelArgument = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the page and the API.")] = 7860,
    host: HostOption = "127.0.0.1",
    open_page: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in the browser.")] = False,
    name: NameOption = None,
    keys: KeysOption = None,
    allow_origin: OriginsOption = None,
    allow_pictures_from: PictureHostsOption = None,
    log_content: ContentOption = False,
    data_folder: DataFolderOption = None,
    engine_url: UrlOption = None,
    engine_key_env: EngineKeyOption = None,
    engine_args: EngineArgumentsOption = "",
    adapters: AdaptersOption = None,
    adapter: AdapterOption = None,
) -> None:
    """Chat about pictures in the browser; the API is there too, under /v1.

    With keys (kangaroo key new) the browser asks for a name and a password: any name, and the key.
    """
    options = Options(
        model, name, host, port, keys, allow_origin, allow_pictures_from, log_content, data_folder,
        engine_url, engine_key_env, engine_args, adapters, adapter,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="kangaroo-") as uploads:
        # What visitors upload goes away with the server. Gradio reads this when it is imported.
        os.environ["GRADIO_TEMP_DIR"] = uploads
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        run_server(options, with_page=True, open_page=open_page)


@commands.command(rich_help_panel=PANEL, epilog="Example: kangaroo serve --port 8000")
def serve(
    model: ModelArgument = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the API.")] = 8000,
    host: HostOption = "127.0.0.1",
    name: NameOption = None,
    keys: KeysOption = None,
    allow_origin: OriginsOption = None,
    allow_pictures_from: PictureHostsOption = None,
    log_content: ContentOption = False,
    data_folder: DataFolderOption = None,
    engine_url: UrlOption = None,
    engine_key_env: EngineKeyOption = None,
    engine_args: EngineArgumentsOption = "",
    adapters: AdaptersOption = None,
    adapter: AdapterOption = None,
) -> None:
    """Serve the OpenAI-compatible API, without the page.

    Once there are keys (kangaroo key new), every route but /health wants one.
    """
    options = Options(
        model, name, host, port, keys, allow_origin, allow_pictures_from, log_content, data_folder,
        engine_url, engine_key_env, engine_args, adapters, adapter,
    )  # fmt: skip
    run_server(options, with_page=False)


def run_server(options: Options, with_page: bool, open_page: bool = False) -> None:
    """Runs engine and gateway, with the page where wanted, until Ctrl-C; exit code 130 then."""
    from assistant.models import ModelError, find_model
    from serving.adapter_folders import FolderError
    from serving.engine import EngineError
    from serving.jobs.data_folder import DataFolderError
    from serving.keys import KeyFileError
    from serving.model_folder import read_model_folder
    from serving.origins import OriginError
    from serving.server import serve as serve_gateway

    model, host = options.model, options.host
    with plain_errors(ModelError, EngineError, KeyFileError, OriginError, DataFolderError, FolderError):
        folder = find_model(model)
        name = options.name or (folder.name if model is None or Path(model).exists() else model)
        facts = read_model_folder(folder)
        engine = engine_of(options, facts, name)
        adapters = adapters_of(options)
        doors = doors_of(options)
        data = data_of(options)

    def attach(gateway: "fastapi.FastAPI") -> "fastapi.FastAPI":
        from serving.server import bracketed
        from ui.browser.chat import attach_page, build_page

        address = f"http://{bracketed(LOOPBACK.get(host, host))}:{options.port}"
        attach_page(gateway, build_page(f"{address}/v1", api_key=None, model_name=name))
        if open_page:
            # The port listens already, so that the browser waits for the page instead of finding nothing there.
            webbrowser.open(address)
        return gateway

    interrupted = remembered_interrupt()
    code = serve_gateway(
        engine, facts, name, host, options.port,
        doors=doors, remote_hosts=remote_hosts_of(options), data=data, adapters=adapters,
        attach=attach if with_page else None,
    )  # fmt: skip
    raise typer.Exit(130 if interrupted() else code)


def engine_of(options: Options, facts: "ModelFacts", name: str) -> "AbstractContextManager[Engine]":
    """The engine that the options ask for, not started.

    Raises EngineError where vLLM is not installed, flags for it are refused, or a key is not where it is said to be.
    """
    from serving.engine import EngineError, LocalEngine, RemoteEngine
    from serving.engine_arguments import parse_engine_arguments
    from serving.restarting import RestartingEngine

    if options.engine_url is None:
        if options.engine_key_env is not None:
            raise EngineError(
                "--engine-key-env goes with --engine-url: the key of our own vLLM is new with each start."
            )
        arguments = parse_engine_arguments(options.engine_arguments)
        return RestartingEngine(
            lambda: LocalEngine(facts.folder, name, takes_adapters=facts.takes_adapters, more_arguments=arguments)
        )
    if options.engine_arguments:
        raise EngineError("--engine-args are for our own vLLM; the one at --engine-url was started with its own.")
    if not options.engine_url.startswith(("http://", "https://")):
        raise EngineError(f"--engine-url {options.engine_url} is no address: write http://host:port.")
    key = None
    if options.engine_key_env is not None and not (key := os.environ.get(options.engine_key_env)):
        raise EngineError(f"--engine-key-env {options.engine_key_env}: there is no such environment variable.")
    return RemoteEngine(options.engine_url, key, name)


def adapters_of(options: Options) -> "AdapterPlaces":
    """Which adapters are served from the start, and where requests may load others from. Raises FolderError."""
    from serving.adapter_folders import adapters_below, named_adapter
    from serving.adapters import AdapterPlaces

    named = dict(adapters_below(options.adapters)) if options.adapters is not None else {}
    return AdapterPlaces(named=named | dict(map(named_adapter, options.named_adapters or ())), folder=options.adapters)


def doors_of(options: Options) -> "Doors":
    """Who may come in. Raises KeyFileError and OriginError where the options cannot be used."""
    from serving.day_counts import DayCounts, file_of_counts
    from serving.doors import Doors
    from serving.keys import KeyRing, default_key_file
    from serving.origins import checked_origin
    from serving.quotas import Quotas

    # A file that is named must be there; the usual one asks for keys once it is.
    file = options.keys or default_key_file()
    keys = KeyRing(file) if options.keys is not None or file.exists() else None
    origins = tuple(checked_origin(origin) for origin in options.origins or ())
    quotas = Quotas(kept=DayCounts(file_of_counts(file)) if keys is not None else None)
    return Doors(keys=keys, quotas=quotas, origins=origins, names=(options.host,), log_content=options.log_content)


def data_of(options: Options) -> "DataFolder | None":
    """Where files and jobs are kept; None, told in words, where the usual folder cannot be used.

    Raises DataFolderError where one that was named cannot be.
    """
    from serving.jobs.data_folder import DataFolder, DataFolderError, default_data_folder

    try:
        return DataFolder(options.data_folder or default_data_folder())
    except DataFolderError as error:
        if options.data_folder is not None:
            raise
        tell(f"{error} Meanwhile this one keeps no files and teaches nothing.")
        return None


def remote_hosts_of(options: Options) -> "RemoteHosts | None":
    """Where pictures may be fetched."""
    from assistant.images import DEFAULT_LIMITS
    from serving.pictures import RemoteHosts

    return RemoteHosts(options.picture_hosts, DEFAULT_LIMITS) if options.picture_hosts else None


def remembered_interrupt() -> Callable[[], bool]:
    """Remembers whether Ctrl-C came: the server ends in order then, and returns as if nobody had pressed it."""
    pressed = False

    def interrupt(number: int, frame: object) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    return lambda: pressed
