"""Choose some rows of checked data and make them ready to be shown: learned words marked, pictures small."""

from dataclasses import dataclass

from PIL import Image

from assistant.images import PictureError, open_picture
from training.data.conversations import PictureReference
from training.data.data_check import Check, spread
from training.data.lesson_judge import LessonJudge, Piece
from training.data.picture_references import PictureFinder
from training.data.recognise import ConversationRows

THUMBNAIL = 240  # pixels of the longer side


@dataclass(frozen=True)
class Shown:
    """One row to be shown."""

    place: str
    tokens: int
    supervised: int
    pieces: list[Piece]
    pictures: list[PictureReference]


def shown_samples(check: Check, rows: ConversationRows, judge: LessonJudge, count: int) -> list[Shown]:
    """Up to `count` of the taught rows, evenly spread."""
    shown = []
    for row in spread(check.good, count):
        conversation = rows[row - 1]
        encoded = judge.encode(conversation, check.sizes.get(row, ()))
        pieces = judge.pieces(encoded)
        shown.append(
            Shown(rows.place(row - 1), len(encoded.ids), sum(encoded.supervised), pieces, list(conversation.pictures))
        )
    return shown


def thumbnail(finder: PictureFinder, reference: PictureReference, side: int = THUMBNAIL) -> Image.Image | None:
    """The picture with `side` pixels on its longer side, or None when it changed since it was checked."""
    try:
        picture = open_picture(finder.content(reference), name=str(reference), enough=side)
    except PictureError:
        return None
    picture.thumbnail((side, side))
    return picture
