"""Place pictures on a plane so that those whose features are near lie near (t-SNE)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from training.data.folders import FolderPictures
from training.data.pictures import DataError
from training.evaluation.picture_features import FileFeatures

FEWEST = 5  # pictures; of fewer there are no neighbourhoods to keep
MOST = 5_000  # pictures; t-SNE of so many takes about a minute of two cores
PERPLEXITY = 30.0  # how many neighbours a picture keeps, about (van der Maaten and Hinton 2008: 5 to 50)
NO_SPREAD = 1e-6  # of features of unit length: what rounding alone makes of equal ones
COMPONENTS = 50  # principal ones that t-SNE reads, as its authors have it


@dataclass(frozen=True)
class Placed:
    """Files and where they lie, (N, 2) from 0 to 1 on both axes, with one scale for both."""

    files: tuple[Path, ...]
    points: np.ndarray


def place(features: FileFeatures, seed: int) -> Placed:
    """A map of the pictures by t-SNE from scikit-learn; of more than `MOST` a lot of so many, drawn with `seed`.

    The perplexity is 30, or a third of the pictures where there are few. Raises DataError for fewer than `FEWEST`,
    and where all features are the same.
    """
    count = len(features.files)
    if count < FEWEST:
        raise DataError(f"a map needs at least {FEWEST} pictures that can be read, and there are {count}")
    chosen = np.arange(count)
    if count > MOST:
        chosen = np.sort(np.random.default_rng(seed).permutation(count)[:MOST])
    vectors = features.vectors.numpy()[chosen].astype(np.float64)
    components = min(COMPONENTS, *vectors.shape)
    reduced = PCA(components, random_state=seed).fit_transform(vectors)
    if reduced.std(0).max() < NO_SPREAD:  # t-SNE would divide by it
        raise DataError(
            f"all {len(chosen)} pictures have the same features, so there is no map: the tower has collapsed (or they "
            "are copies of one picture)"
        )
    perplexity = min(PERPLEXITY, (len(chosen) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced)
    points = points - (points.min(0) + points.max(0)) / 2
    return Placed(tuple(features.files[number] for number in chosen), points / np.abs(points).max() / 2 + 0.5)


def label_names(pictures: FolderPictures) -> list[str | None]:
    """The label of each picture: the sub-folder it lies in; None for one that lies in the folder itself."""
    return [pictures.catalogue.label(number) for number in range(len(pictures.files))]
