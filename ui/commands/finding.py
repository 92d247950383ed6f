"""Commands that find and sort pictures without any training."""

from pathlib import Path
from typing import Annotated

import typer

from ui.commands.shared import PicturesArgument, fail, plain_errors, stopping, tell

PANEL = "Find and sort pictures"
commands = typer.Typer()


TowerOption = Annotated[
    str | None,
    typer.Option("--tower", help="A CLIP or SigLIP with both halves: a folder or a hub name.", show_default="Joey's"),
]


@commands.command(
    rich_help_panel=PANEL, epilog='Example: kangaroo classify holiday/*.jpg --labels "a beach, a forest, a city"'
)
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


@commands.command(
    rich_help_panel=PANEL,
    epilog='Example: kangaroo search holiday "a dog in the snow"   or   kangaroo search holiday --like dog.jpg',
)
def search(
    folder: Annotated[Path, typer.Argument(help="The folder of pictures, with those below it.", show_default=False)],
    words: Annotated[str | None, typer.Argument(help="What to look for, in quotes.", show_default=False)] = None,
    like: Annotated[Path | None, typer.Option(help="Look for pictures like this one instead.")] = None,
    count: Annotated[int, typer.Option(min=1, help="How many pictures are told.")] = 10,
    tower: TowerOption = None,
    index: Annotated[Path | None, typer.Option(help="Where the index is kept.", show_default="in the folder")] = None,
    anew: Annotated[bool, typer.Option("--anew", help="Make the index again, such as for another tower.")] = False,
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
    with plain_errors(IndexFileError, PictureError), FolderSearch(folder, embedder, index, anew) as found:
        with stopping("stopped. What was read so far is kept; the same command goes on from there."):
            news = found.refresh()
        for path, reason in news.damaged.items():
            tell(f"left out: {path}: {reason}")
        tell(said_of(news))
        for hit in found.by_picture(like, count) if like else found.by_words(str(words), count):
            print(f"{hit.likeness:.3f} {hit.path}")
