"""Search the pictures of a folder by words or by a picture, through an index that is kept up to date."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import track
from torch import Tensor

from assistant.embeddings import Embedder
from assistant.file_embedding import embed_files
from assistant.images import PictureError
from assistant.nearest import Hit, Searcher
from assistant.picture_index import IndexFileError, PictureIndex, Refreshed

__all__ = ["FolderSearch", "Hit", "IndexFileError", "said_of"]


class FolderSearch:
    """The pictures below a folder, and what finds them; close it, or use it in a `with`."""

    def __init__(self, folder: Path, embedder: Embedder, file: Path | None = None, anew: bool = False) -> None:
        """`file` is where the index is kept; in the folder where None. With `anew` what it held is forgotten.

        Raises IndexFileError where it cannot be kept there, or was made with another tower.
        """
        self.embedder = embedder
        self.index = PictureIndex(folder, embedder.key, file, anew)
        self._searcher: Searcher | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.index.close()

    def refresh(self) -> Refreshed:
        """Bring the index up to date, with a bar on the terminal, and load it."""
        news = self.index.refresh(self._embedded)
        paths, vectors = self.index.vectors()
        self._searcher = Searcher(paths, vectors) if paths else None
        return news

    def by_words(self, words: str, count: int) -> list[Hit]:
        """The `count` pictures that `words` fit best, best first."""
        return self._nearest(self.embedder.texts([words])[0], count)

    def by_picture(self, picture: Path, count: int) -> list[Hit]:
        """The `count` pictures that are most like the one in the file `picture`. Raises PictureError for that one."""
        ((_, vector),) = embed_files(self.embedder, [picture])
        if isinstance(vector, PictureError):
            raise vector
        return self._nearest(vector, count)

    def _nearest(self, query: Tensor, count: int) -> list[Hit]:
        if self._searcher is None:
            raise IndexFileError(f"no picture that can be read in {self.index.folder} or below it")
        return self._searcher.nearest(query, count)

    def _embedded(self, files: Iterable[Path]) -> Iterator[tuple[Path, Tensor | PictureError]]:
        files = list(files)
        console = Console(stderr=True)
        yield from track(
            embed_files(self.embedder, files), "reading new pictures", len(files), console=console, disable=not files
        )


def said_of(news: Refreshed) -> str:
    """A line about what an index took in."""
    total = news.unchanged + news.added + news.changed + news.moved
    kinds = {"new": news.added, "changed": news.changed, "moved": news.moved, "gone": news.removed}
    told = [f"{number:,} {kind}" for kind, number in kinds.items() if number]
    return f"{total:,} pictures" + (f" ({', '.join(told)})" if told else "")
