"""The command `kangaroo`: the one place that knows every package, and imports each one late so that help is instant."""

import json
import os
import signal
import sys
import tempfile
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    import fastapi
    from PIL.Image import Image

DISTRIBUTION = "kangaroo-assistant"
CAPTION_BATCH = 8
LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}

app = typer.Typer(
    name="kangaroo",
    help="A visual assistant: chat about pictures, serve it, teach it.",
    epilog="Start with: kangaroo chat",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

ModelArgument = Annotated[
    str | None,
    typer.Argument(metavar="[MODEL]", help="A model folder or a hub name (organisation/name).", show_default="Joey"),
]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="A model folder or a hub name (organisation/name).", show_default="Joey")
]
TowerOption = Annotated[
    str | None,
    typer.Option("--tower", help="A CLIP or SigLIP with both halves: a folder or a hub name.", show_default="Joey's"),
]
HostOption = Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")]
PicturesArgument = Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Picture files.", show_default=False)]


@contextmanager
def plain_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Ends the command with one line on standard error and exit code 1 where an error of these kinds comes up."""
    try:
        yield
    except kinds as error:
        raise fail(str(error)) from error


def fail(message: str) -> typer.Exit:
    """Says what is wrong on standard error, and gives the exception that ends the command with exit code 1."""
    tell(message)
    return typer.Exit(1)


def tell(message: str) -> None:
    """Prints one line on standard error, not wrapped and not coloured, so that it can be searched and parsed."""
    print(f"kangaroo: {message}", file=sys.stderr, flush=True)


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


@app.command(epilog="Example: kangaroo chat --open")
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


@app.command(epilog="Example: kangaroo serve --port 8000")
def serve(
    model: ModelArgument = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the API.")] = 8000,
    host: HostOption = "127.0.0.1",
) -> None:
    """Serve the OpenAI-compatible API, without the page."""
    run_server(model, host, port, with_page=False)


@app.command(epilog='Example: kangaroo ask photo.jpg "What is the dog doing?"')
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


@app.command(epilog="Example: kangaroo caption holiday/*.jpg")
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


@app.command(epilog="Example: kangaroo train scenes    (needs no data)   or   kangaroo train joey --data pictures/")
def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe (scenes, joey) or a .yaml file.", show_default=False)],
    data: Annotated[
        Path | None, typer.Option(envvar="KANGAROO_DATA", help="The folder of Parquet shards that the recipe names.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Where stages, checkpoints and the result go.")] = Path("runs"),
    stage: Annotated[str | None, typer.Option(help="Run this stage alone, on what those before it left.")] = None,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Two tiny steps of each stage, to see that all fits together.")
    ] = False,
) -> None:
    """Train a model by a recipe, stage after stage; run it again to go on where it stopped."""
    from training.config import InstructStage, RecipeError, read_recipe, rehearsal
    from training.data.pictures import DataError
    from training.recipe import run_recipe

    with plain_errors(RecipeError, DataError):
        read = read_recipe(recipe)
        try:
            result = run_recipe(rehearsal(read) if rehearse else read, data, runs, stage)
        except KeyboardInterrupt:
            tell("stopped. The same command goes on from the newest checkpoint.")
            raise typer.Exit(130) from None
    answers = isinstance(read.stages[-1], InstructStage) and stage is None
    print(f"The result is in {result}. Try it: kangaroo {'chat' if answers else 'evaluate'} {result}")


@app.command(epilog="Example: kangaroo evaluate runs/dino/model --train birds/train --test birds/test")
def evaluate(
    tower: Annotated[
        str | None,
        typer.Argument(
            metavar="[TOWER]", help="A tower's folder or hub name (organisation/name).", show_default="Joey's embedder"
        ),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Labelled pictures to learn from: a folder of labels' folders, or a shard."),
    ] = None,
    test: Annotated[str | None, typer.Option(metavar="DATA", help="Labelled pictures to name.")] = None,
    pairs: Annotated[
        str | None, typer.Option(metavar="DATA", help="Pictures with captions: a .jsonl or .csv file, or a shard.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(envvar="KANGAROO_DATA", help="The folder of the Parquet shards that are named.")
    ] = None,
    features: Annotated[
        Literal["pooled", "patches", "both"], typer.Option(help="What probes read; patches is the mean over them.")
    ] = "pooled",
    neighbours: Annotated[int, typer.Option(min=1, help="How many neighbours vote in kNN.")] = 20,
    batch: Annotated[int, typer.Option(min=1, help="Pictures that the tower sees at once.")] = 64,
    bf16: Annotated[bool, typer.Option("--bf16", help="Run the tower in bfloat16 autocast.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the report into this file too, as JSON.")] = None,
) -> None:
    """Measure a vision tower: kNN and linear probe, and with a text half naming without examples and retrieval."""
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise fail(f"--out {out}: name a file in a folder that exists")
    from rich.console import Console

    from assistant.models import EMBEDDER, JOEY, ModelError
    from training.data.pictures import DataError
    from training.evaluation.tower_report import Wanted, measure_tower, report_table

    wanted = Wanted(train, test, pairs, features, neighbours, batch, bf16)
    with plain_errors(ModelError, DataError):
        report = measure_tower(tower or JOEY / EMBEDDER, wanted, data)
    Console().print(report_table(report))
    if out is not None:
        out.write_text(json.dumps(report, indent=2) + "\n")


@app.command(epilog='Example: kangaroo classify holiday/*.jpg --labels "a beach, a forest, a city"')
def classify(
    images: PicturesArgument,
    labels: Annotated[str, typer.Option(help="The labels to choose from, with commas between them.")],
    tower: TowerOption = None,
    first: Annotated[int, typer.Option(min=1, help="How many of the likeliest labels are told.")] = 1,
) -> None:
    """Say which of your labels fits each picture best; nothing has to be trained for it."""
    names = [name.strip() for name in labels.split(",") if name.strip()]
    if len(names) < 2:
        raise fail('--labels: give at least two, with commas between them. Example: --labels "a cat, a dog"')
    from assistant.embeddings import load_embedder
    from assistant.file_embedding import embed_files
    from assistant.images import PictureError
    from assistant.models import EMBEDDER, JOEY, ModelError
    from assistant.naming import label_embeddings, label_shares

    with plain_errors(ModelError):
        embedder = load_embedder(tower or JOEY / EMBEDDER)
    wanted = label_embeddings(embedder.texts, names)
    unread = 0
    for path, vector in embed_files(embedder, images):
        if isinstance(vector, PictureError):
            tell(str(vector))
            unread += 1
            continue
        shares, places = label_shares(embedder, vector[None], wanted.cpu())[0].topk(min(first, len(names)))
        told = ", ".join(f"{names[place]} {share:.0%}" for share, place in zip(shares, places, strict=True))
        print(f"{path}: {told}", flush=True)
    if unread:
        raise fail(f"{unread} of {len(images)} pictures could not be read.")


@app.command(
    epilog='Example: kangaroo search holiday "a dog in the snow"   or   kangaroo search holiday --like dog.jpg'
)
def search(
    folder: Annotated[Path, typer.Argument(help="The folder of pictures, with those below it.", show_default=False)],
    words: Annotated[str | None, typer.Argument(help="What to look for, in quotes.", show_default=False)] = None,
    like: Annotated[Path | None, typer.Option(help="Look for pictures like this one instead.")] = None,
    count: Annotated[int, typer.Option(min=1, help="How many pictures are told.")] = 10,
    tower: TowerOption = None,
    index: Annotated[Path | None, typer.Option(help="Where the index is kept.", show_default="in the folder")] = None,
) -> None:
    """Find pictures by words or by a picture. The index is kept beside them and takes in what changed."""
    if (words is None) == (like is None):
        raise fail("say what to look for: either words, or --like with a picture")
    from assistant.embeddings import load_embedder
    from assistant.images import PictureError
    from assistant.models import EMBEDDER, JOEY, ModelError
    from assistant.searching import FolderSearch, IndexFileError, said_of

    with plain_errors(ModelError):
        embedder = load_embedder(tower or JOEY / EMBEDDER)
    with plain_errors(IndexFileError, PictureError), FolderSearch(folder, embedder, index) as found:
        news = found.refresh()
        for path, reason in news.damaged.items():
            tell(f"left out: {path}: {reason}")
        tell(said_of(news))
        for hit in found.by_picture(like, count) if like else found.by_words(str(words), count):
            print(f"{hit.likeness:.3f} {hit.path}")


@app.command(epilog="Example: kangaroo look facebook/dinov2-small dog.jpg cat.jpg --side 448")
def look(
    tower: Annotated[str, typer.Argument(help="A tower's folder or hub name.", show_default=False)],
    images: PicturesArgument,
    out: Annotated[Path, typer.Option(help="The sheet: .png, .svg or .pdf.")] = Path("look.png"),
    side: Annotated[int | None, typer.Option(min=32, help="Pixels of a side.", show_default="the tower's own")] = None,
) -> None:
    """Draw what a tower looks at: the attention of each head, and its patches as colours."""
    if out.suffix not in (".png", ".svg", ".pdf") or not out.absolute().parent.is_dir():
        raise fail(f"--out {out}: name a .png, .svg or .pdf file in a folder that exists")
    from assistant.images import PictureError
    from assistant.models import ModelError
    from assistant.towers import load_tower
    from training.evaluation.look import look as draw

    with plain_errors(ModelError, PictureError, ValueError):
        draw(load_tower(tower).eval(), images, out, side)
    print(f"see {out}")


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


def main() -> None:
    """The entry point of the command `kangaroo`."""
    app(prog_name="kangaroo")


if __name__ == "__main__":
    main()
