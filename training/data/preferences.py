"""Pairs of answers about pictures, from rows that people have, from generated scenes, and from captions of others."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from assistant.chat import assistant_message, user_message
from assistant.pixels import pixels_of
from assistant.tiles import size_of
from training.data.conversation_lessons import ConversationLessons
from training.data.conversations import Conversation, RowError
from training.data.pictures import DataError, Picture, PictureSet
from training.data.preference_rows import rejected_of
from training.data.preference_scenes import scene_pair
from training.data.samples import CAPTION_QUESTIONS, pick, sentence
from training.data.scenes import SceneKind, kind_of, make_scene
from training.data.views import square
from training.lessons import Lesson

ATTEMPTS = 20  # to find another picture with another caption


@dataclass(frozen=True)
class Preference(Lesson):
    """A lesson that ends in the better answer, and the same conversation with the worse one at its end."""

    rejected: tuple[dict[str, Any], ...] = ()

    def other(self) -> Lesson:
        """The lesson that ends in the worse answer."""
        return Lesson(**_fields(self) | {"messages": self.rejected})


def preference_of(lesson: Lesson, rejected: Sequence[dict[str, Any]]) -> Preference:
    """`lesson`, which says it all in `messages`, against `rejected`."""
    return Preference(**_fields(lesson), rejected=tuple(rejected))


def _fields(lesson: Lesson) -> dict[str, Any]:
    return {field.name: getattr(lesson, field.name) for field in fields(Lesson)}


def asked(name: str, view: Any, question: str, chosen: str, rejected: str) -> Preference:
    """One question about one picture, uint8 (3, side, side), with two answers."""
    said = [(user_message(question, 1), assistant_message(answer)) for answer in (chosen, rejected)]
    return preference_of(Lesson(name, (view,), (), messages=said[0]), said[1])


class RowPreferences(ConversationLessons):
    """The pairs of a source of rows; bad rows are counted, named, and within a budget skipped."""

    def _made(self, conversation: Conversation, where: str) -> Lesson:
        lesson, rejected = super()._made(conversation, where), rejected_of(conversation)
        self.judge.encode(rejected, [size_of(view) for view in lesson.views])
        return preference_of(lesson, rejected.chat_messages())

    def check(self) -> None:
        """Reads the words of every row and looks for its pictures. Raises DataError when too many rows are bad."""
        for place in self._chosen:
            try:
                for picture in self.rows[int(place)].pictures:
                    self.finder.content(picture)
            except RowError as error:
                self._refuse(int(place), error)


class ScenePreferences:
    """Pairs about generated scenes: a true answer, and a plausible one that is not."""

    def __init__(self, count: int, side: int, first_seed: int = 0, kinds: Sequence[SceneKind] = ()) -> None:
        self.count, self.side, self.first_seed, self.kinds = count, side, first_seed, kinds

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int, generator: np.random.Generator) -> Preference:
        """A pair about scene `index`."""
        scene = make_scene(self.first_seed + index, self.side, kind_of(index, self.kinds))
        pair = scene_pair(scene, generator)
        view = pixels_of(scene.image)
        return asked(f"scene {scene.seed}", view, pair.question, pair.chosen, pair.rejected)


class CaptionPreferences:
    """A picture's own caption against that of another picture: whoever does not look cannot tell which is better."""

    def __init__(self, pictures: PictureSet, side: int, others: PictureSet) -> None:
        """Wrong captions are those of `others`. Raises DataError where these are fewer than two."""
        if len(others) < 2:
            raise DataError("pairs of captions need two pictures or more; add pictures")
        self.pictures, self.side, self.others = pictures, side, others

    def __len__(self) -> int:
        return len(self.pictures)

    def sample(self, index: int, generator: np.random.Generator) -> Preference:
        """A caption of picture `index` against one of another picture, drawn by chance.

        Raises DataError where all others that are tried have the very same captions.
        """
        picture = self.pictures[index]
        own = {sentence(text) for text in picture.texts}
        for _ in range(ATTEMPTS):
            other: Picture = self.others[int(generator.integers(len(self.others)))]
            foreign = [text for text in other.texts if sentence(text) not in own]
            if foreign:
                chosen, rejected = sentence(pick(picture.texts, generator)), sentence(pick(foreign, generator))
                question = pick(CAPTION_QUESTIONS, generator)
                return asked(picture.name, square(picture.pixels, self.side), question, chosen, rejected)
        raise DataError(f"{picture.name}: {ATTEMPTS} other pictures have the same captions; pairs need different ones")
