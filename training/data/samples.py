"""Turn pictures, scenes and texts into the samples that objectives train on, each place of a run reproducibly."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
from torch.utils.data import Dataset

from assistant.pixels import pixels_of
from assistant.questions import CAPTION_QUESTION
from training.data.mixing import Phase, mixture_plan, phased_plan
from training.data.pictures import DataError, DecodedPictures, Picture, PictureRow, PictureSet, read_rows
from training.data.scenes import SceneKind, kind_of, make_scene
from training.data.texts import TextRow
from training.data.views import mirrors_safely, random_view, square
from training.objectives.instruct import Lesson

CAPTION_QUESTIONS = (
    CAPTION_QUESTION,
    "Describe this picture.",
    "What is in this picture?",
    "What is happening in this picture?",
    "Write a caption for this picture.",
)
LABEL_QUESTIONS = ("What is this?", "What is the main thing in this picture?", "What kind of picture is this?")
KEPT_ASIDE = 32  # one picture in so many validates where no source is named for it
SCENE_CHARACTERS = 220  # of the questions and answers about a scene, on average
SMALLEST_LESSON_CROP = 0.8  # of the area, where the words name details that a small crop would lose

Sample = TypeVar("Sample", covariant=True)


class Source(Protocol[Sample]):
    """Something with samples that are drawn with chance from a given generator only."""

    def __len__(self) -> int: ...

    def sample(self, index: int, generator: np.random.Generator) -> Sample:
        """Sample number `index`; what is random about it comes from `generator`."""


class Mixture(Dataset[Sample], Generic[Sample]):
    """`total` samples mixed from weighted sources; place n is the same sample on every run."""

    def __init__(
        self, sources: Sequence[Source[Sample]], weights: Sequence[float] | Sequence[Phase], total: int, seed: int
    ) -> None:
        """`weights` are the sources' shares, or phases in which they change."""
        self.sources = sources
        self.seed = seed
        sizes = [len(s) for s in sources]
        phases = [weight for weight in weights if isinstance(weight, Phase)]
        shares = [weight for weight in weights if not isinstance(weight, Phase)]
        plan = phased_plan(sizes, phases, total, seed) if phases else mixture_plan(sizes, shares, total, seed)
        self.source_of, self.index_of = plan

    def __len__(self) -> int:
        return len(self.source_of)

    def __getitem__(self, place: int) -> Sample:
        generator = np.random.default_rng([self.seed, 2, place])
        return self.sources[self.source_of[place]].sample(int(self.index_of[place]), generator)


def pick(options: Sequence[str], generator: np.random.Generator) -> str:
    """One of `options`, evenly."""
    return options[int(generator.integers(len(options)))]


class Views(Generic[Sample]):
    """The views that an objective makes of pictures."""

    def __init__(self, pictures: PictureSet, make: Callable[[Picture, np.random.Generator], Sample]) -> None:
        self.pictures, self.make = pictures, make

    def __len__(self) -> int:
        return len(self.pictures)

    def sample(self, index: int, generator: np.random.Generator) -> Sample:
        """Views of picture `index`."""
        return self.make(self.pictures[index], generator)


class Chosen:
    """Some pictures of a set, by index."""

    def __init__(self, pictures: PictureSet, places: np.ndarray) -> None:
        self.pictures, self.places = pictures, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Picture:
        """The picture at place `index` of the chosen ones."""
        return self.pictures[int(self.places[index])]


def kept_aside(pictures: PictureSet) -> tuple[Chosen, Chosen]:
    """Pictures to train on and pictures to validate on: every 32nd of the set, and at least one.

    Raises DataError for a set of one picture.
    """
    if len(pictures) < 2:
        raise DataError("there is one picture, and training needs at least one more to validate on; add pictures")
    places = np.arange(len(pictures))
    aside = places % min(KEPT_ASIDE, len(pictures)) == min(KEPT_ASIDE, len(pictures)) - 1
    return Chosen(pictures, places[~aside]), Chosen(pictures, places[aside])


class ShardLessons:
    """Lessons on the pictures of one shard: its captions, its label, or its questions."""

    def __init__(self, folder: Path, shard: str, use: str, side: int | None, turns: int, augment: bool = True) -> None:
        """`side` pixels of a view; None leaves pictures in their own size, for a model that cuts tiles."""
        self.turns_of = {"captions": _caption_turns, "labels": _label_turns, "questions": _question_turns}[use]
        self.rows = [row for row in read_rows(folder, shard) if getattr(row, "label" if use == "labels" else use)]
        if not self.rows:
            raise DataError(f"no row of {shard} has {use}; use another shard or another field")
        self.pixels = DecodedPictures(self.rows)
        self.side, self.turns, self.augment = side, turns, augment

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, index: int, generator: np.random.Generator) -> Lesson:
        """Up to `turns` turns about row `index`, in random order."""
        row = self.rows[index]
        turns = self.turns_of(row, generator)
        chosen = tuple(turns[i] for i in generator.permutation(len(turns))[: self.turns])
        if not self.augment:
            return Lesson(row.id, (square(self.pixels[index], self.side),), chosen)
        mirror = all(mirrors_safely(f"{question} {answer}") for question, answer in chosen)
        view = random_view(self.pixels[index], self.side, generator, SMALLEST_LESSON_CROP, mirror)
        return Lesson(row.id, (view,), chosen)

    def extent(self, index: int) -> tuple[int, int]:
        """One picture, and the characters of its turns, or their share where there are more than are taken."""
        turns = self.turns_of(self.rows[index], np.random.default_rng(0))
        characters = sum(len(question) + len(answer) for question, answer in turns)
        return 1, characters * min(self.turns, len(turns)) // len(turns)


def _caption_turns(row: PictureRow, generator: np.random.Generator) -> list[tuple[str, str]]:
    return [(_caption_question(generator), sentence(caption)) for caption in row.captions]


def _caption_question(generator: np.random.Generator) -> str:
    # The canonical question half the time: it is what `kangaroo caption` asks.
    return CAPTION_QUESTION if generator.random() < 0.5 else pick(CAPTION_QUESTIONS, generator)


def _label_turns(row: PictureRow, generator: np.random.Generator) -> list[tuple[str, str]]:
    return [(pick(LABEL_QUESTIONS, generator), sentence(str(row.label)))]


def _question_turns(row: PictureRow, generator: np.random.Generator) -> list[tuple[str, str]]:
    return [(question.question, question.answer) for question in row.questions]


def sentence(text: str) -> str:
    """`text` stripped, with a capital and, when it has several words, a full stop."""
    stripped = text.strip()
    capital = stripped[:1].upper() + stripped[1:]
    return capital if capital.endswith((".", "!", "?")) or " " not in capital else f"{capital}."


class SceneLessons:
    """Lessons on generated scenes: all their questions, and a caption one time in two."""

    def __init__(
        self,
        count: int,
        side: int | None,
        first_seed: int = 0,
        kinds: Sequence[SceneKind] = (),
        drawn: int | None = None,
    ) -> None:
        """`side` pixels of a view, None as for shards; scenes are `drawn` so large, where None as large as a view."""
        large = drawn or side
        if large is None:
            raise ValueError("scenes that stay in their own size need one: say how large they are drawn")
        self.count, self.side, self.first_seed, self.kinds, self.drawn = count, side, first_seed, kinds, large

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int, generator: np.random.Generator) -> Lesson:
        """The questions of scene `index`; one lesson in five is a dialogue, so that earlier turns are familiar."""
        scene = make_scene(self.first_seed + index, self.drawn, kind_of(index, self.kinds))
        turns = [(question.question, question.answer) for question in scene.questions]
        if generator.random() < 0.5:
            turns.append((_caption_question(generator), sentence(pick(scene.captions, generator))))
        shuffled = tuple(turns[i] for i in generator.permutation(len(turns)))
        view = square(pixels_of(scene.image), self.side)
        return Lesson(f"scene {scene.seed}", (view,), shuffled, bool(generator.random() < 0.2))

    def extent(self, index: int) -> tuple[int, int]:
        """One picture, and what is asked of one on average: scenes are much alike."""
        return 1, SCENE_CHARACTERS


class TextLessons:
    """Lessons without a picture: a prompt and its answer."""

    def __init__(self, rows: Sequence[TextRow], longest_characters: int) -> None:
        self.rows = [
            row for row in rows if row.prompt and row.text and len(row.prompt) + len(row.text) <= longest_characters
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, index: int, generator: np.random.Generator) -> Lesson:
        """Row `index`."""
        row = self.rows[index]
        return Lesson(f"{row.source} text {index}", (), ((str(row.prompt), row.text),))

    def extent(self, index: int) -> tuple[int, int]:
        """No picture, and the characters of both."""
        row = self.rows[index]
        return 0, len(str(row.prompt)) + len(row.text)
