"""What `/v1/captions` and `/v1/answers` take and give: pictures in, a text of each out."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from assistant.questions import CaptionStyle
from serving.protocols.common import MOST_TEXT, Part, Text
from serving.protocols.errors import ErrorObject

MOST_PICTURES = 64  # in one request; each is asked about on its own

DataUrl = Annotated[str, Field(description="A picture as a data URL: `data:image/png;base64,...`.")]
Pictures = Annotated[list[DataUrl], Field(min_length=1, max_length=MOST_PICTURES)]
MaxTokens = Annotated[int, Field(ge=1, description="Cut each text off after so many tokens.")]
Temperature = Annotated[float, Field(ge=0, le=2, description="0, the default, always gives the likeliest text.")]


class PicturesRequest(Part):
    """What both take."""

    model: Annotated[Text | None, Field(description="The served model where it is left out.")] = None
    pictures: Pictures
    max_tokens: MaxTokens | None = None
    temperature: Temperature = 0


class CaptionsRequest(PicturesRequest):
    """The body of `POST /v1/captions`, as JSON or as a form whose `pictures` are files."""

    style: Annotated[
        CaptionStyle,
        Field(description="One sentence, all that is to be seen, or words for those who cannot see the picture."),
    ] = "short"


class AnswersRequest(PicturesRequest):
    """The body of `POST /v1/answers`: one question, asked about each picture on its own."""

    question: Annotated[Text, Field(min_length=1, max_length=MOST_TEXT, pattern=r"\S")]


class Usage(BaseModel):
    """Tokens that the model read (pictures included) and wrote."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class PictureText(BaseModel):
    """What was said of one picture, or the error that kept it from being looked at."""

    object: Literal["picture_text"] = "picture_text"
    index: int
    name: Annotated[str | None, Field(description="The file's name, where one was uploaded.")] = None
    text: str | None = None
    finish_reason: Annotated[str | None, Field(description="`stop`, or `length` where it was cut off.")] = None
    usage: Usage = Usage()
    seconds: Annotated[float, Field(description="From opening the picture to the last word.")] = 0.0
    error: ErrorObject | None = None


class PictureTexts(BaseModel):
    """The answer: a text for each picture, in the order of the request. `failed` of them hold an error instead."""

    object: Literal["list"] = "list"
    model: str
    data: list[PictureText]
    failed: int
    usage: Usage
    seconds: float
