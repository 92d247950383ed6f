"""Open what a recipe calls a source of pictures, whatever format it is in."""

import os
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from random import Random

from assistant.pixels import pixels_of
from training.config import PictureSource
from training.data.caption_files import CaptionedPictures
from training.data.catalogue import EncodedPictures, stamp_of, texts_of
from training.data.decoding import DecodedSet
from training.data.folders import FolderPictures
from training.data.hub_datasets import TablePictures
from training.data.pictures import Picture, PictureSet, ShardPictures
from training.data.scenes import SMALLEST_SIDE, Scene, SceneKind, kind_of, make_scene
from training.data.tars import TarPictures, expand_tars


def open_pictures(
    source: PictureSource, data_folder: Callable[[], Path], side: int, first_scene: int = 0
) -> PictureSet:
    """The pictures of `source` for views of `side` pixels.

    A relative path of the recipe counts from the data folder, which is asked for only when it is needed. Generated
    scenes begin with the seed `first_scene`. Raises DataError, before the first step, when there is nothing to read or
    what there is cannot be read.
    """
    if source.scenes is not None:
        return ScenePictures(source.scenes, source.side or side, source.use, first_scene, source.kinds)
    name, encoded = open_encoded(source, data_folder)
    cache = None if source.cache is None else located(source.cache, data_folder)
    return DecodedSet(name, encoded, source.use, side, source.damaged, int(source.memory * 2**30), cache)


def open_encoded(source: PictureSource, data_folder: Callable[[], Path]) -> tuple[str, EncodedPictures]:
    """What errors call `source`, and its pictures as they are stored. Not for scenes, which are not stored."""
    if source.shard is not None:
        return f"shard {source.shard}", ShardPictures(data_folder(), source.shard)
    if source.folder is not None:
        folder = located(source.folder, data_folder)
        return f"folder {folder}", FolderPictures(folder)
    if source.captions is not None:
        file = located(source.captions, data_folder)
        return f"caption file {file}", CaptionedPictures(file)
    if source.tars is not None:
        return f"tars {source.tars}", TarPictures(tars_of(source, data_folder))
    if source.dataset is not None:
        local = source.dataset.startswith(("/", "~", "."))
        place = located(source.dataset, data_folder) if local else source.dataset
        columns = (source.image_column, source.text_column, source.label_column)
        return f"dataset {source.dataset}", TablePictures(place, source.split, *columns)
    raise ValueError("a source of scenes has no encoded pictures")


def name_and_stamp(source: PictureSource, data_folder: Callable[[], Path]) -> tuple[str, str]:
    """What errors call `source`, and the names, sizes and times of its files. Raises DataError when one is missing."""
    if source.stream:
        return f"tars {source.tars}", stamp_of(tars_of(source, data_folder))
    name, encoded = open_encoded(source, data_folder)
    return name, encoded.stamp()


def tars_of(source: PictureSource, data_folder: Callable[[], Path]) -> list[Path]:
    """The tars of a source of tars, in order. Raises DataError when one is missing."""
    return expand_tars(str(located(str(source.tars), data_folder)))


def located(path: str, data_folder: Callable[[], Path]) -> Path:
    """A path of a recipe; a relative one counts from the data folder, which is asked for only then."""
    expanded = Path(path).expanduser()
    return expanded if expanded.is_absolute() else Path(os.path.normpath(data_folder() / expanded))


class ScenePictures:
    """Generated scenes: their captions are the texts, and the kind of scene is the label."""

    def __init__(self, count: int, side: int, use: str, first_seed: int = 0, kinds: Sequence[SceneKind] = ()) -> None:
        """`side` pixels of a view; a scene is drawn just so large, and at least as large as its words can be read."""
        self.count, self.side, self.use, self.first_seed = count, max(side, SMALLEST_SIDE), use, first_seed
        self.kinds = kinds

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Picture:
        """Scene `index`."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        scene = make_scene(self.first_seed + index, self.side, kind_of(index, self.kinds))
        texts = texts_of(scene.captions, scene.kind, self.use)
        true: tuple[str, ...] = ()
        if self.use == "statements":
            texts, true = _stated(scene), (*scene.captions, *chain.from_iterable(scene.statements))
        return Picture(f"scene {scene.seed}", pixels_of(scene.image), texts, scene.kind, true, True, scene.regions)


def _stated(scene: Scene) -> tuple[str]:
    """One text of `scene`, drawn by its seed: a caption one time in five, else a statement.

    The first sort of statements (of objects: their shapes) is drawn half the time: it is learned last.
    """
    random = Random(scene.seed)
    if random.random() < 0.2:
        return (random.choice(scene.captions),)
    sort = 0 if random.random() < 0.5 else random.randrange(len(scene.statements))
    return (random.choice(scene.statements[sort]),)
