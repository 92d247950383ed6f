"""Lessons from rows of conversations; rows that cannot be taught are counted, named, and within a budget skipped."""

import copy
import hashlib
import logging
import math

import numpy as np
from torch import Tensor

from assistant.tiles import size_of
from training.data.conversations import Conversation, PictureReference, RowError
from training.data.decoding import NAMED, PROBES, check_damage, decode
from training.data.lesson_judge import LessonJudge
from training.data.picture_references import PictureFinder
from training.data.pictures import DataError
from training.data.pixel_cache import shared_zeros
from training.data.recognise import ConversationRows
from training.data.views import square
from training.objectives.instruct import Lesson

GOOD, REFUSED = 1, 2  # what is known of a row; 0 is nothing yet
UNREADABLE = -1  # in place of what a row is about

log = logging.getLogger(__name__)


def decoded_picture(finder: PictureFinder, reference: PictureReference, side: int | None) -> Tensor:
    """Pixels for views of `side` pixels, uint8 (3, H, W), see `decode`. Raises RowError."""
    content = finder.content(reference)
    try:
        return decode(content, str(reference), side)
    except DataError as error:
        raise RowError("damaged picture", reference.field, str(error).rstrip("."), "mend it or take it out") from error


class ConversationLessons:
    """One lesson a row, with pictures where the row has them.

    The place of a row that `kangaroo data check` would refuse is taken by the next good one, so that a place of a run
    is the same lesson on every run. It is named in the log, and DataError ends the run once more than the share
    `damaged` of the rows is refused; 0 is strict.
    """

    def __init__(
        self, rows: ConversationRows, finder: PictureFinder, judge: LessonJudge, damaged: float = 0.01
    ) -> None:
        """Raises DataError when too many of the rows that are tried before the first step are refused."""
        self.rows, self.finder, self.judge, self.share = rows, finder, judge, damaged
        self._chosen = np.arange(len(rows))
        self._known = shared_zeros((len(rows),), np.uint8)  # shared: workers count together
        for place in np.unique(np.linspace(0, len(rows) - 1, min(PROBES, len(rows))).round().astype(int)):
            self._lesson(int(place))

    def __len__(self) -> int:
        return len(self._chosen)

    def sample(self, index: int, generator: np.random.Generator) -> Lesson:
        """The lesson of row `index`, or of the next good one. Raises DataError once too many are refused."""
        for step in range(len(self)):
            lesson = self._lesson(int(self._chosen[(index + step) % len(self)]))
            if lesson is not None:
                return lesson
        raise DataError(f"{self.rows.name}: none of its {len(self)} rows can be taught")

    def extent(self, index: int) -> tuple[int, int]:
        """Pictures and characters of row `index`; none of a row that cannot be read."""
        try:
            conversation = self.rows[int(self._chosen[index])]
        except RowError:
            return 0, 0
        return len(conversation.pictures), sum(len(message.text) for message in conversation.messages)

    def kept_aside(self, one_in: int) -> tuple["ConversationLessons", "ConversationLessons"]:
        """Lessons to train on and lessons to validate on: those of one picture in `one_in`, and of one at least.

        Rows whose first picture has the same name are on one side, so that a score is not of pictures that were
        trained on; so are rows of the same words without a picture. Raises DataError when there is nothing to divide.
        """
        groups = np.array([self._group(int(place)) for place in self._chosen])
        different = np.unique(groups[groups != UNREADABLE])
        if len(different) < 2:
            raise DataError(
                f"{self.rows.name}: its {len(self)} rows are all about one picture, so none can be kept aside to "
                "validate on; name others as held_out_conversations"
            )
        aside = np.isin(groups, different[: math.ceil(len(different) / one_in)])
        return self._only(self._chosen[~aside]), self._only(self._chosen[aside])

    def _group(self, place: int) -> int:
        """A number as if by chance that is the same for rows about one picture."""
        try:
            conversation = self.rows[place]
        except RowError:
            return UNREADABLE
        pictures = conversation.pictures
        key = self.finder.key(pictures[0]) if pictures else repr([message.parts for message in conversation.messages])
        return int(hashlib.sha256(key.encode()).hexdigest()[:12], 16)

    def _only(self, places: np.ndarray) -> "ConversationLessons":
        chosen = copy.copy(self)  # what is known of rows is shared: a refused one is counted once
        chosen._chosen = places
        return chosen

    def _lesson(self, place: int) -> Lesson | None:
        if self._known[place] == REFUSED:
            return None
        try:
            conversation = self.rows[place]
            lesson = self._made(conversation, self.rows.place(place))
            if self._known[place] != GOOD:
                self.judge.encode(conversation, [size_of(view) for view in lesson.views])
        except RowError as error:
            self._refuse(place, error)
            return None
        self._known[place] = GOOD
        return lesson

    def _made(self, conversation: Conversation, where: str) -> Lesson:
        side = self.judge.view_side
        views = tuple(square(decoded_picture(self.finder, each, side), side) for each in conversation.pictures)
        name = f"{where} of {self.rows.name}"
        return Lesson(name, views, (), is_dialogue=conversation.turns > 1, messages=conversation.chat_messages())

    def _refuse(self, place: int, error: RowError) -> None:
        """Count a row once, and say so."""
        self._known[place] = REFUSED
        reason = f"{self.rows.place(place)}: {error}"
        log.warning("skipped a row of %s: %s", self.rows.name, reason)
        places = np.flatnonzero(self._known == REFUSED)
        names = [reason, *(self.rows.place(int(other)) for other in places[:NAMED] if other != place)]
        what = "rows cannot be taught (see `kangaroo data check`)"
        check_damage(self.rows.name, self.share, len(places), len(self.rows), names, what)
