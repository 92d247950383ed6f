"""Look at held-out pictures through a tower while it trains: what it tells apart, and how far it has moved."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from assistant.embeddings import Embedder
from assistant.naming import label_embeddings
from assistant.towers import Tower
from training.config import Monitor
from training.data.pictures import DataError, Picture, PictureSet
from training.data.views import random_view, square
from training.evaluation.probes import NEIGHBOURS, knn_labels
from training.evaluation.zero_shot import ranks, recall, who_says_what, zero_shot_labels
from training.objective import Watched
from training.representation import alignment, kept_direction, rank_me, uniformity
from training.self_distillation import spread

LAST_LOOK = "last_look.safetensors"  # in a checkpoint: what the next look after a resume is compared with
FEWEST = 8  # pictures; of fewer no measure says anything
SMALLEST_CROP = 0.5  # share of a picture in the crop that should be seen as the picture itself
PICTURES_A_LABEL = 4  # on average; where labels are rarer they are names, and neighbours cannot share them


@dataclass(frozen=True)
class Shown:
    """B held-out pictures as a tower sees them."""

    views: Tensor  # (B, 3, S, S) uint8, all of each picture
    crops: Tensor  # (B, 3, S, S) uint8, a part of each, half of them mirrored
    labels: tuple[str | None, ...]
    texts: tuple[tuple[str, ...], ...]

    @property
    def has_labels(self) -> bool:
        """Whether neighbours can be asked for labels: each picture has one, and they are neither one nor too many."""
        kinds = set(self.labels)
        return None not in kinds and 2 <= len(kinds) <= len(self.labels) / PICTURES_A_LABEL

    @property
    def has_texts(self) -> bool:
        """Whether each picture has a text."""
        return all(self.texts)


def shown(sets: Sequence[PictureSet], most: int, side: int) -> Shown | None:
    """At most `most` pictures evenly from all of `sets`, for views of `side` pixels; None where they are too few."""
    sizes = np.cumsum([0, *map(len, sets)])
    if sizes[-1] < FEWEST:
        return None
    places = np.unique(np.linspace(0, sizes[-1] - 1, min(most, int(sizes[-1]))).round().astype(int))
    pictures = [_picture_at(sets, sizes, int(place)) for place in places]
    crops = [
        random_view(picture.pixels, side, np.random.default_rng(place), SMALLEST_CROP, True)
        for place, picture in zip(places, pictures, strict=True)
    ]
    return Shown(
        torch.stack([square(picture.pixels, side) for picture in pictures]),
        torch.stack(crops),
        tuple(picture.label for picture in pictures),
        tuple(picture.texts for picture in pictures),
    )


def _picture_at(sets: Sequence[PictureSet], sizes: np.ndarray, place: int) -> Picture:
    which = int(np.searchsorted(sizes, place, side="right")) - 1
    return sets[which][place - int(sizes[which])]


class TowerMonitor:
    """Measures a tower on the same held-out pictures at each look, and remembers the last one."""

    def __init__(
        self,
        settings: Monitor,
        side: int,
        batch: int,
        held_out: Sequence[PictureSet],
        labelled: PictureSet | None = None,
        pairs: PictureSet | None = None,
    ) -> None:
        """Views of `side` pixels, `batch` at a time. Raises DataError where what is named cannot be measured on."""
        self.every, self.batch = settings.every, batch
        self.pictures = shown(held_out, settings.pictures, side)
        self.labelled = self._named(labelled, settings.pictures, side)
        self.pairs = self._named(pairs, settings.pictures, side)
        if self.labelled is not None and not self.labelled.has_labels:
            raise DataError(
                f"monitor.labelled: of the {len(self.labelled.labels)} pictures that are looked at each needs a label, "
                f"of two labels or more, with {PICTURES_A_LABEL} pictures a label on average; name other pictures, or "
                "raise monitor.pictures"
            )
        if self.pairs is not None and not self.pairs.has_texts:
            raise DataError("monitor.pairs: each picture needs a text; `use` says which: captions or labels")
        self._last: dict[str, Tensor] = {}

    @staticmethod
    def _named(pictures: PictureSet | None, most: int, side: int) -> Shown | None:
        if pictures is None:
            return None
        seen = shown([pictures], most, side)
        if seen is None:
            raise DataError(f"a monitor needs {FEWEST} pictures or more, and there are {len(pictures)}")
        return seen

    def measure(self, watched: Watched) -> dict[str, float]:
        """What is seen now, by name (see `docs/pretraining.md`); the caller keeps modes and random state.

        Where a feature is not finite, the share of pictures with such a one alone: `features_not_finite`.
        """
        if self.pictures is None or watched.tower is None:
            return {}
        look = _Look(watched, watched.tower, self.batch)
        features = look.features(self.pictures)
        if not bool(features.isfinite().all()):
            return {"features_not_finite": _share(~features.isfinite().all(-1))}
        units = functional.normalize(features, dim=-1)
        values = {
            "rank": rank_me(features),
            "directions": rank_me(units - units.mean(0)),
            "spread": float(spread(features)),
            **look.pairs_of_views(self.pictures),
        }
        values |= self._since_last(features, values["alignment"])
        labelled = self.labelled or (self.pictures if self.pictures.has_labels else None)
        if labelled is not None:
            values |= look.named_labels(labelled)
        pairs = self.pairs or (self.pictures if self.pictures.has_texts else None)
        if pairs is not None:
            values |= look.retrieved(pairs)
        return values

    def _since_last(self, features: Tensor, aligned: float) -> dict[str, float]:
        """How much the features moved since the last look: 1 - linear CKA; and the change of alignment."""
        before, self._last = self._last, {"features": features, "alignment": torch.tensor([aligned])}
        if not before:
            return {}
        moved = 1.0 - kept_direction(before["features"], features)
        return {"drift": moved, "alignment_drift": aligned - float(before["alignment"])}

    def save(self, folder: Path) -> None:
        """Keep the last look in `folder`, a checkpoint."""
        if self._last:
            save_file(self._last, folder / LAST_LOOK)

    def load(self, folder: Path) -> None:
        """Go on from the look that `save` kept in `folder`; from none where there is none."""
        file = folder / LAST_LOOK
        self._last = load_file(file) if file.is_file() else {}


class _Look:
    """One look through a tower: each picture goes through it once, whatever is asked of it."""

    def __init__(self, watched: Watched, tower: Tower, batch: int) -> None:
        self.tower, self.pooled, self.batch = tower, watched.pooled, batch
        self.device = next(tower.parameters()).device
        self.embedder = None
        if watched.model is not None and watched.tokenizer is not None:
            self.embedder = Embedder(watched.model, tower.image_processor, watched.tokenizer, Path())
        self._known: dict[int, Tensor] = {}

    def features(self, shown: Shown) -> Tensor:
        """(B, D) float32 on the CPU: the pooled output, or the mean of the patches where only those are trained."""
        if id(shown) not in self._known:
            self._known[id(shown)] = self._run(shown.views)
        return self._known[id(shown)]

    def _run(self, views: Tensor) -> Tensor:
        parts = []
        for some in views.split(self.batch):
            output = self.tower(self.tower.normalise(some.to(self.device)))
            parts.append((output.pooled if self.pooled else output.patches.mean(1)).float().cpu())
        return torch.cat(parts)

    def _embedded(self, embedder: Embedder, shown: Shown) -> Tensor:
        return embedder.of_pooled(self.features(shown).to(self.device)).cpu()

    def pairs_of_views(self, shown: Shown) -> dict[str, float]:
        """Alignment of each picture with its first text where it has one, else with a crop of it; and uniformity."""
        if self.embedder is not None and shown.has_texts:
            pictures = self._embedded(self.embedder, shown)
            others = self.embedder.texts([texts[0] for texts in shown.texts]).cpu()
        else:
            pictures = functional.normalize(self.features(shown), dim=-1)
            others = functional.normalize(self._run(shown.crops), dim=-1)
        return {"alignment": alignment(pictures, others), "uniformity": uniformity(pictures)}

    def named_labels(self, shown: Shown) -> dict[str, float]:
        """kNN: every other picture asks those between; and zero-shot of all, where the model reads."""
        kinds = sorted({str(label) for label in shown.labels})
        labels = torch.tensor([kinds.index(str(label)) for label in shown.labels])
        known, asked = self.features(shown)[::2], self.features(shown)[1::2]
        found = knn_labels(known, labels[::2], asked, min(NEIGHBOURS, len(known)))
        values = {"knn": _share(found == labels[1::2])}
        if self.embedder is not None:
            prompts = label_embeddings(self.embedder.texts, kinds).cpu()
            values["zero_shot"] = _share(zero_shot_labels(self._embedded(self.embedder, shown), prompts) == labels)
        return values

    def retrieved(self, shown: Shown) -> dict[str, float]:
        """R@1 in both directions, where the model reads."""
        if self.embedder is None:
            return {}
        pictures = self._embedded(self.embedder, shown)
        said, right = who_says_what(shown.texts)
        texts = self.embedder.texts(said).cpu()
        return {
            "picture_to_text": recall(ranks(pictures, texts, right), 1),
            "text_to_picture": recall(ranks(texts, pictures, right.T), 1),
        }


def _share(right: Tensor) -> float:
    return float(right.float().mean())


IN_WORDS = {
    "rank": "rank {:.1f}",
    "spread": "spread {:.2f}",
    "alignment": "alignment {:.2f}",
    "uniformity": "uniformity {:.2f}",
    "drift": "moved {:.3f}",
    "knn": "kNN {:.1%}",
    "zero_shot": "zero-shot {:.1%}",
    "picture_to_text": "picture finds text {:.1%}",
    "text_to_picture": "text finds picture {:.1%}",
}


def in_words(values: dict[str, float]) -> str:
    """What `TowerMonitor.measure` saw, in a line for people."""
    said = [form.format(values[name]) for name, form in IN_WORDS.items() if name in values]
    return "held-out pictures: " + (", ".join(said) if said else "features are not finite")
