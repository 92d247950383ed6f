"""Stream webdataset tars that cannot be read at random: shared among readers, shuffled, and resumed by position."""

import itertools
import logging
import stat
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from training.data.catalogue import texts_of
from training.data.decoding import check_damage, decode
from training.data.pictures import DataError, Picture
from training.data.tars import TarSample, samples_of

log = logging.getLogger(__name__)


class TarStream(IterableDataset[Picture]):
    """Pictures of tars without end, or for a number of epochs, each tar read from its start to its end.

    In an epoch every tar goes to one of all readers (ranks x workers), in an order that the seed draws anew each epoch;
    a reader shuffles its samples in a buffer. Of R ranks rank r is told its number; the workers of a DataLoader find
    theirs. A damaged picture's place is taken by the next good one of that reader, so that a place is the same picture
    on every run, and a run goes on by the number of samples that it has used.
    """

    def __init__(
        self,
        tars: Sequence[Path],
        use: str,
        side: int,
        seed: int,
        *,
        buffer: int = 1000,
        epochs: int | None = None,
        damaged: float = 0.01,
        rank: int = 0,
        ranks: int = 1,
        batch_size: int = 1,
    ) -> None:
        """`side` is that of the views, as in `decode`. `batch_size` is that of the DataLoader, whose workers take turns
        batch by batch. `epochs` None repeats for ever. Without end all ranks have equally many samples, with an end
        they have not."""
        self.tars, self.use, self.side, self.seed = list(tars), use, side, seed
        self.buffer, self.epochs, self.share = buffer, epochs, damaged
        self.rank, self.ranks, self.batch_size = rank, ranks, batch_size
        self._used = 0
        self._counts: dict[Path, int] = {}

    def state_dict(self) -> dict[str, Any]:
        """Where this rank stands: `samples`, how many it has used, and what has to be alike to go on from there.

        `samples` counts what this object itself has yielded. Workers yield in copies of it: there the caller, who knows
        its steps, puts steps x batch_size in its place.
        """
        tars = [str(tar) for tar in self.tars]
        return {"samples": self._used, "seed": self.seed, "ranks": self.ranks, "buffer": self.buffer, "tars": tars}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after `state["samples"]` samples of this rank. Raises DataError when tars or settings are others."""
        own = self.state_dict()
        changed = [name for name in own if name != "samples" and own[name] != state[name]]
        if changed:
            raise DataError(f"the stream cannot go on where it was: {', '.join(changed)} changed")
        self._used = int(state["samples"])

    def __iter__(self) -> Iterator[Picture]:
        return (picture for _, _, picture in self.numbered())

    def numbered(self) -> Iterator[tuple[int, int, Picture]]:
        """The pictures, each with its reader and its place among that one's: the same two numbers on every run."""
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        # A loader asks worker 0 first, so on a resumed run that one takes the part of the worker whose turn it was.
        number = (number + self._used // self.batch_size) % workers
        readers, reader = self.ranks * workers, self.rank * workers + number
        if len(self.tars) < readers:
            raise DataError(
                f"{len(self.tars)} tars cannot be shared among {readers} readers ({self.ranks} ranks x {workers} "
                "workers); cut the data into more tars, or take fewer workers"
            )
        first = self._used_by(number, workers)
        for place, picture in enumerate(self._pictures(reader, readers, first), start=first):
            self._used += 1
            yield reader, place, picture

    def _used_by(self, number: int, workers: int) -> int:
        """How many of the rank's used samples came from worker `number`: whole batches, turn by turn."""
        batches, rest = divmod(self._used, self.batch_size)
        turns, next_worker = divmod(batches, workers)
        used = (turns + (number < next_worker)) * self.batch_size
        return used + (rest if number == next_worker else 0)

    def _pictures(self, reader: int, readers: int, position: int) -> Iterator[Picture]:
        """The pictures of one reader from `position` on; what lies before is not decoded."""
        draws = self._draws(reader, readers, position)
        waiting: list[TarSample] = []  # drawn ahead of their place, after a damaged one
        seen, damaged = 0, list[str]()
        while True:
            if not waiting:
                waiting.extend(itertools.islice(draws, 1))
            if not waiting:
                return
            seen += 1
            place = 0
            while (pixels := self._attempt(waiting[place], seen, damaged)) is None:
                place += 1
                if place == len(waiting):
                    following = next(draws, None)
                    if following is None:
                        raise DataError(f"{self._name()}: the last pictures are damaged: {damaged[-1]}")
                    waiting.append(following)
            sample = waiting[place]
            yield Picture(sample.key, pixels, texts_of(sample.captions, sample.label, self.use), sample.label)
            waiting.pop(0)

    def _attempt(self, sample: TarSample, seen: int, damaged: list[str]) -> Tensor | None:
        """Pixels of `sample`, or None when it is damaged, which is said and counted once."""
        if sample.picture is None:
            return None
        try:
            return decode(sample.picture, sample.key, self.side)
        except DataError as error:
            sample.picture = None
            damaged.append(str(error))
            log.warning("skipped a damaged picture of %s: %s", self._name(), error)
            check_damage(self._name(), self.share, len(damaged), seen + 1, damaged)
            return None

    def _name(self) -> str:
        return f"the stream of {self.tars[0]} and {len(self.tars) - 1} more tars"

    def _draws(self, reader: int, readers: int, position: int) -> Iterator[TarSample]:
        """The reader's samples from `position` on, epoch after epoch, in shuffled order."""
        for epoch in itertools.count() if self.epochs is None else range(self.epochs):
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.tars))
            mine = [self.tars[number] for number in order[reader::readers]]
            # An epoch that was used up is passed over by the counts of its tars, where tars can be read twice.
            if position and all(_is_file(tar) for tar in mine):
                length = sum(self._count(tar) for tar in mine)
                if position >= length:
                    position -= length
                    continue
            for sample in self._shuffled(mine, np.random.default_rng([self.seed, epoch, reader])):
                if position:
                    position -= 1
                else:
                    yield sample

    def _count(self, tar: Path) -> int:
        if tar not in self._counts:
            self._counts[tar] = sum(self._has_use(s) for s in _samples(tar, read_pictures=False))
        return self._counts[tar]

    def _has_use(self, sample: TarSample) -> bool:
        return sample.size >= 0 and (self.use == "pictures" or bool(texts_of(sample.captions, sample.label, self.use)))

    def _shuffled(self, tars: Sequence[Path], generator: np.random.Generator) -> Iterator[TarSample]:
        """Samples through a buffer: once it is full, a random one leaves for each that comes."""
        kept: list[TarSample] = []
        found = False
        for sample in (s for tar in tars for s in _samples(tar, read_pictures=True) if self._has_use(s)):
            found = True
            if len(kept) < self.buffer:
                kept.append(sample)
                continue
            place = int(generator.integers(len(kept)))
            kept[place], sample = sample, kept[place]
            yield sample
        if not found:
            raise DataError(f"no sample of {', '.join(map(str, tars[:3]))} has a picture with {self.use}")
        for place in generator.permutation(len(kept)):
            yield kept[place]


class StreamedViews(IterableDataset[Any]):
    """The views that an objective makes of the pictures of a stream; all chance comes from a picture's place."""

    def __init__(self, pictures: TarStream, make: Callable[[Picture, np.random.Generator], Any]) -> None:
        self.pictures, self.make = pictures, make

    def __iter__(self) -> Iterator[Any]:
        for reader, place, picture in self.pictures.numbered():
            yield self.make(picture, np.random.default_rng([self.pictures.seed, 2, reader, place]))

    def go_on_after(self, samples: int) -> None:
        """Begin behind the first `samples` of this rank."""
        self.pictures.load_state_dict({**self.pictures.state_dict(), "samples": samples})


def _is_file(tar: Path) -> bool:
    return stat.S_ISREG(tar.stat().st_mode)


def _samples(tar: Path, read_pictures: bool) -> Iterator[TarSample]:
    """The samples of a tar, compressed or not, a pipe or a file, read once from its start to its end."""
    try:
        with tar.open("rb") as file, tarfile.open(fileobj=file, mode="r|*") as opened:
            yield from samples_of(opened, str(tar), read_pictures)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"the tar {tar} cannot be read: {error}") from error
