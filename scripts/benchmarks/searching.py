"""Search many embeddings beside FAISS's flat index, and refresh the index of a folder in which nothing changed."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import faiss
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from assistant.file_embedding import file_hashes
from assistant.images import PictureError
from assistant.nearest import Searcher
from assistant.picture_files import pictures_below
from assistant.picture_index import PictureIndex
from scripts.benchmarks.measuring import Disagreement, Pair

CENTRES = 200  # pictures come in kinds; evenly spread vectors would be easier to tell apart
QUERIES = 20
FOUND = 10
FILES_A_FOLDER = 200


def search_pair(vectors: int, width: int) -> Pair:
    """`QUERIES` searches, one after the other, for the nearest `FOUND` of so many vectors: their likenesses added up.

    Raises Disagreement when one of them does not find what products in float64 find.
    """
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CENTRES, width, generator=generator)
    kinds = torch.randint(0, CENTRES, (vectors,), generator=generator)
    stored = functional.normalize(centres[kinds] + torch.randn(vectors, width, generator=generator), dim=-1)
    asked = functional.normalize(centres[:QUERIES] + torch.randn(QUERIES, width, generator=generator), dim=-1)
    searcher = Searcher([Path(str(number)) for number in range(vectors)], stored.numpy())
    flat = faiss.IndexFlatIP(width)
    flat.add(stored.numpy())
    for query in asked:
        likeness = stored.double() @ query.double()
        expected = likeness.topk(FOUND).values
        found = torch.tensor([hit.likeness for hit in searcher.nearest(query, FOUND)], dtype=torch.float64)
        if not torch.allclose(found, expected, rtol=0, atol=1e-6):
            raise Disagreement(f"searching {vectors} x {width}: found {found.tolist()}, expected {expected.tolist()}")

    def ours() -> Tensor:
        return torch.tensor(sum(hit.likeness for query in asked for hit in searcher.nearest(query, FOUND)))

    def theirs() -> Tensor:
        return torch.tensor(sum(float(flat.search(query[None].numpy(), FOUND)[0].sum()) for query in asked))

    return Pair(
        f"{QUERIES} searches of {vectors:,} x {width}", "faiss flat", ours, theirs, 1e-4, "float16, then float32"
    )


class UnchangedFolder:
    """A folder of many small files and an index of it that is up to date."""

    def __init__(self, folder: Path, files: int, width: int) -> None:
        """The files have no picture in them: what does not change is not opened. Each gets an embedding by chance."""
        self.folder, self.files, self.width = folder, files, width
        for number in range(files):
            file = folder / f"{number // FILES_A_FOLDER:03d}" / f"{number:06d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(number.to_bytes(8, "big"))
        self.index = PictureIndex(folder, "tower")
        self.index.refresh(self._embedded)

    def check(self) -> None:
        """Raises Disagreement when the index does not see that nothing changed, or that one file did."""
        if self.index.refresh(self._embedded).unchanged != self.files:
            raise Disagreement("the index says that something changed, and nothing did")
        (self.folder / "000" / "000000.jpg").write_bytes(b"another")
        if self.index.refresh(self._embedded).changed != 1:
            raise Disagreement("the index did not see that a file changed")

    def refresh(self) -> Tensor:
        """What `kangaroo search` does before each search but for the tower: open, refresh, load the embeddings."""
        index = PictureIndex(self.folder, "tower")
        news = index.refresh(self._embedded)
        Searcher(*index.vectors())
        index.close()
        return torch.tensor(float(news.unchanged))

    def hash_all(self) -> Tensor:
        """What it would be without sizes and times: read every file."""
        return torch.tensor(float(sum(1 for _ in file_hashes(pictures_below(self.folder)))))

    def _embedded(self, files: Iterable[Path]) -> Iterator[tuple[Path, Tensor | PictureError]]:
        generator = np.random.default_rng(0)
        for file in files:
            yield file, torch.from_numpy(generator.standard_normal(self.width, np.float32))


def refresh_pair(folder: Path, files: int, width: int) -> Pair:
    """A refresh of a folder in which nothing changed, beside reading all of its files, which are tiny here."""
    unchanged = UnchangedFolder(folder, files, width)
    unchanged.check()
    return Pair(
        f"refresh {files:,} unchanged", "hash all", unchanged.refresh, unchanged.hash_all, 0.0, "sizes and times"
    )
