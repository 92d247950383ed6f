"""Questions about pictures on which a merged or exported model is compared: generated scenes, or rows of own data."""

from pathlib import Path

from assistant.answering import Request
from assistant.images import PictureError, open_picture
from assistant.questions import CAPTION_QUESTION
from training.data.conversations import RowError
from training.data.picture_references import PictureFinder
from training.data.pictures import DataError
from training.data.recognise import ConversationRows, recognise
from training.data.scenes import EVALUATION_SEED, make_scene


def check_requests(source: str | None, count: int, pictures: Path | None = None) -> list[Request]:
    """At most `count` questions, of `source` or, where it is None, about scenes; see `row_requests`."""
    return scene_requests(count) if source is None else row_requests(source, count, pictures)


def scene_requests(count: int) -> list[Request]:
    """One question about each of the first `count` scenes that no training sees.

    Every other one asks for a caption: in its many tokens a model that was damaged shows more than in one sure word.
    """
    scenes = [make_scene(EVALUATION_SEED + number) for number in range(count)]
    asked = [CAPTION_QUESTION if number % 2 else scene.questions[0].question for number, scene in enumerate(scenes)]
    return [Request(question, (scene.image,)) for question, scene in zip(asked, scenes, strict=True)]


def row_requests(source: str, count: int, pictures: Path | None = None) -> list[Request]:
    """The first question, with its pictures, of each of the first `count` rows of conversations.

    Relative paths of pictures count from `source`, or from the folder `pictures`.
    Raises DataError, naming the row, where one cannot be read.
    """
    rows = recognise(source)
    finder = PictureFinder(rows.base, pictures)
    return [_request(rows, place, finder) for place in range(min(count, len(rows)))]


def _request(rows: ConversationRows, place: int, finder: PictureFinder) -> Request:
    try:
        asked = next(message for message in rows[place].messages if message.role == "user")
        opened = tuple(open_picture(finder.content(reference)) for reference in asked.pictures)
    except (RowError, PictureError) as error:
        raise DataError(f"{rows.name}, {rows.place(place)}: {error}") from error
    return Request(asked.text.strip(), opened)
