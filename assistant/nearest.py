"""Find the nearest of many embeddings, exactly."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

SPARE = 32  # candidates beside those that are wanted
# A product of two vectors of unit length, one of them in float16, is off by no more: half of its last of 11 bits.
ROUNDING = 2.0**-11 + 2.0**-16


@dataclass(frozen=True)
class Hit:
    """A picture that was found, and the cosine of its embedding and the query's."""

    path: Path
    likeness: float


class Searcher:
    """Finds the nearest of some embeddings by their inner product, in float32.

    Reading every vector takes most of the time, so FAISS first goes through copies in float16, half as large; the
    candidates are then measured again. Those that are left out are proven to be farther away.
    """

    def __init__(self, paths: Sequence[Path], vectors: np.ndarray) -> None:
        """`vectors` (N, D) float32 of unit length, one for each path."""
        import faiss

        self.paths = list(paths)
        self._vectors = np.ascontiguousarray(vectors, np.float32)
        half, product = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        self._rough = faiss.IndexScalarQuantizer(vectors.shape[1], half, product)
        self._rough.add(self._vectors)

    def nearest(self, query: Tensor, count: int) -> list[Hit]:
        """The `count` pictures (or all, where there are fewer) nearest to `query` (D,) of unit length, best first."""
        wanted = query.float().cpu().numpy()
        count, asked = min(count, len(self.paths)), 0
        while True:
            asked = min(2 * asked + count + SPARE, len(self.paths))
            rough, places = self._rough.search(wanted[None], asked)
            likeness = self._vectors[places[0]] @ wanted
            best = np.argsort(-likeness, kind="stable")[:count]
            # None that was left out is nearer than the roughly last one, but for the rounding.
            if asked == len(self.paths) or likeness[best[-1]] >= rough[0, -1] + ROUNDING:
                return [Hit(self.paths[places[0][place]], float(likeness[place])) for place in best]
