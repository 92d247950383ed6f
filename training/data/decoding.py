"""Turn encoded pictures into the pictures that samples are made of: decoded, cached, damaged ones replaced."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from assistant.images import PictureError, open_picture
from assistant.pixels import pixels_of
from training.data.catalogue import EncodedPictures
from training.data.pictures import DataError, Picture
from training.data.pixel_cache import DEFAULT_MEMORY, PixelMemory, pixel_file, shared_zeros

SPARE = 1.5  # shorter side that is kept, in sides of a view: a crop of 44 % of the area and more is never enlarged
PROBES = 64  # pictures that are tried before the first step
NAMED = 3  # how many pictures an error names

log = logging.getLogger(__name__)


def kept_side(side: int) -> int:
    """The shorter side in pixels of the pictures that views of `side` pixels are cut from; smaller ones stay so."""
    return math.ceil(SPARE * side)


def decode(content: bytes | Path, name: str, side: int | None) -> Tensor:
    """Pixels for views of `side` pixels: uint8 (3, H, W) whose shorter side is at most `kept_side(side)`.

    Where `side` is None the picture has the size in which it would be answered about, for a model that cuts tiles.
    Raises DataError naming the picture and what is wrong with it.
    """
    shorter = None if side is None else kept_side(side)
    try:
        picture = open_picture(content, name=name, enough=shorter)
    except PictureError as error:
        raise DataError(str(error)) from error
    if shorter is None:
        return pixels_of(picture)
    width, height = picture.size
    if min(width, height) > shorter:
        scale = shorter / min(width, height)
        size = (max(shorter, round(width * scale)), max(shorter, round(height * scale)))
        picture = picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    return pixels_of(picture)


def too_many(share: float, damaged: int, of: int) -> bool:
    """Whether `damaged` of `of` are more than the share that may be; one may always be unless the share is 0."""
    return damaged > math.ceil(share * of)


def check_damage(
    source: str, share: float, damaged: int, of: int, names: Sequence[str], what: str = "pictures cannot be read"
) -> None:
    """Raises DataError when `damaged` of `of` things of `source` are `too_many`. `names` are those of a few of them."""
    if not too_many(share, damaged, of):
        return
    listed = "; ".join(names[:NAMED]) + (" ..." if damaged > NAMED else "")
    raise DataError(
        f"{source}: {damaged} of {of} {what}, and the recipe lets a share of {share:g} be damaged. "
        f"{listed}. Mend them or take them out, or allow more with `damaged: {_enough_share(damaged, of)}`"
    )


def _enough_share(damaged: int, of: int) -> float:
    return math.ceil(100 * damaged / of) / 100


class DecodedSet:
    """The pictures of one source that have words for `use`, decoded for views of `side` pixels.

    A picture is decoded once where there is room for its pixels: in `cache` (a folder, filled before the first step),
    or in up to `memory` bytes. Pixels are the same with and without. The place of a damaged picture is taken by the
    next good one, so that a place of a run is the same picture on every run.
    """

    def __init__(
        self,
        source: str,
        encoded: EncodedPictures,
        use: str,
        side: int,
        damaged: float = 0.01,
        memory: int = DEFAULT_MEMORY,
        cache: Path | None = None,
    ) -> None:
        """`source` is what errors call it. Raises DataError when no picture has words for `use`, or too many of those
        tried before the first step (all, with a cache) cannot be read."""
        self.source, self.encoded, self.use, self.side, self.share = source, encoded, use, side, damaged
        self.chosen = encoded.catalogue.having(use)
        if not len(self.chosen):
            raise DataError(
                f"{source}: none of the {len(encoded.catalogue)} pictures has {use}; add them, or say with `use` "
                "what is taught: captions, labels, or pictures where no words are needed"
            )
        self._damaged = shared_zeros((len(self),), np.uint8)  # shared: workers count together
        self._memory = PixelMemory(len(self), memory if cache is None else 0)
        self._file = None
        if cache is not None:
            key = f"{encoded.stamp()} {use} {kept_side(side)}"
            self._file = pixel_file(cache, key, len(self), self._decode, self._note)
            for place, reason in self._file.damaged.items():
                self._note(place, reason)
        for place in np.unique(np.linspace(0, len(self) - 1, min(PROBES, len(self))).round().astype(int)):
            self._pixels(int(place))

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Picture:
        """Picture `index`, or the next good one. Raises DataError once too many are damaged."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        for step in range(len(self)):
            place = (index + step) % len(self)
            pixels = self._pixels(place)
            if pixels is not None:
                chosen, catalogue = int(self.chosen[place]), self.encoded.catalogue
                return Picture(
                    catalogue.name(chosen), pixels, catalogue.texts(chosen, self.use), catalogue.label(chosen)
                )
        raise DataError(f"{self.source}: none of its {len(self)} pictures can be read")

    def _pixels(self, place: int) -> Tensor | None:
        """Pixels of the picture at `place`, or None when it is damaged."""
        if self._damaged[place]:
            return None
        kept = self._file.get(place) if self._file else self._memory.get(place)
        if kept is not None:
            return kept
        try:
            pixels = self._decode(place)
        except DataError as error:
            self._note(place, str(error))
            return None
        self._memory.put(place, pixels)
        return pixels

    def _decode(self, place: int) -> Tensor:
        chosen = int(self.chosen[place])
        return decode(self.encoded.content(chosen), self.encoded.catalogue.name(chosen), self.side)

    def _note(self, place: int, reason: str) -> None:
        """Count a damaged picture once, and say so."""
        if self._damaged[place]:
            return
        self._damaged[place] = 1
        log.warning("skipped a damaged picture of %s: %s", self.source, reason)
        places = np.flatnonzero(self._damaged)
        names = [reason, *(self.encoded.catalogue.name(int(self.chosen[p])) for p in places[:NAMED] if p != place)]
        check_damage(self.source, self.share, len(places), len(self), names)
