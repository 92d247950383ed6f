"""What `/v1/embeddings` and `/v1/classifications` take and give: points of the space that pictures and texts share."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from serving.protocols.captions import Pictures
from serving.protocols.common import ContentPart, Part, PictureAddress, PicturePart, Text, TextPart

MOST_INPUTS = 256
MOST_PICTURES = 64
MOST_PROMPTS = 1_024  # labels times templates
LONGEST_INPUT = 10_000  # characters of a text

InputText = Annotated[Text, Field(min_length=1)]
Input = InputText | ContentPart
Label = Annotated[Text, Field(min_length=1, max_length=200, pattern=r"\S")]
Template = Annotated[Text, Field(min_length=2, max_length=200, pattern=r"\{\}")]


class EmbeddingsRequest(Part):
    """The body of `POST /v1/embeddings`: texts, and pictures as data URLs or as content parts of chat."""

    model: Text
    input: Annotated[
        InputText | Annotated[list[Input], Field(min_length=1, max_length=MOST_INPUTS)],
        Field(description="A text that starts with `data:image/` is a picture. Lists of token ids are not taken."),
    ]
    encoding_format: Literal["float", "base64"] = "float"
    truncate: Annotated[bool, Field(description="Cut texts that are too long instead of refusing them.")] = False
    user: Text | None = None

    @model_validator(mode="after")
    def check(self) -> "EmbeddingsRequest":
        if self.pictures() > MOST_PICTURES:
            raise ValueError(f"input: it holds more than {MOST_PICTURES} pictures")
        for number, part in enumerate(self.parts()):
            if isinstance(part, TextPart) and len(part.text) > LONGEST_INPUT:
                raise ValueError(f"input.{number}: the text holds more than {LONGEST_INPUT:,} characters")
        return self

    def parts(self) -> list[TextPart | PicturePart]:
        """Each text and each picture, as chat writes them."""
        given = [self.input] if isinstance(self.input, str) else self.input
        return [_as_part(each) for each in given]

    def pictures(self) -> int:
        """How many pictures it holds."""
        return sum(isinstance(part, PicturePart) for part in self.parts())


def _as_part(given: str | TextPart | PicturePart) -> TextPart | PicturePart:
    if not isinstance(given, str):
        return given
    if given.lower().startswith("data:image/"):
        return PicturePart(type="image_url", image_url=PictureAddress(url=given))
    return TextPart(type="text", text=given)


class Embedding(BaseModel):
    """One point of unit length; in base64 its float32 numbers, the lowest byte first."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens of the texts, and patches of the pictures."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    """The answer to `POST /v1/embeddings`, in the order of the request."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class ClassificationsRequest(Part):
    """The body of `POST /v1/classifications`, as JSON or as a form whose `pictures` are files."""

    model: Annotated[Text | None, Field(description="The served model where it is left out.")] = None
    pictures: Pictures
    labels: Annotated[list[Label], Field(min_length=2, max_length=MOST_PROMPTS)]
    templates: Annotated[
        list[Template] | None,
        Field(min_length=1, max_length=16, description="Sentences with `{}` for the label; ours where left out."),
    ] = None

    @model_validator(mode="after")
    def check(self) -> "ClassificationsRequest":
        if len(self.labels) * len(self.templates or ["{}"]) > MOST_PROMPTS:
            raise ValueError(f"labels: labels times templates are more than {MOST_PROMPTS:,}")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels: a label is given more than once")
        return self


class Score(BaseModel):
    """How likely a label is among the labels of the request; the scores of a picture sum to 1."""

    label: str
    score: float


class Classification(BaseModel):
    """The likeliest label of a picture, and all of them, best first."""

    object: Literal["classification"] = "classification"
    index: int
    name: str | None = None
    label: str
    scores: list[Score]


class Classifications(BaseModel):
    """The answer to `POST /v1/classifications`, in the order of the request."""

    object: Literal["list"] = "list"
    model: str
    data: list[Classification]
