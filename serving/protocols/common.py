"""What every request is made of: strict fields, writable texts, content parts and messages."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MOST_MESSAGES = 1_000
MOST_TEXT = 1_000_000  # characters in one request


def writable(text: str) -> str:
    """Refuse halves of surrogate pairs: JSON can spell them, but they are no characters and cannot be passed on."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("the text holds half a surrogate pair, which is no character") from error
    return text


Text = Annotated[str, AfterValidator(writable)]


class Part(BaseModel):
    # Strict: "5" is no number and 1 is no truth. Forbidden extras keep vLLM's own switches (chat_template,
    # mm_processor_kwargs, ...) out of reach.
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class TextPart(Part):
    type: Literal["text"]
    text: Text


class PictureAddress(Part):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class PicturePart(Part):
    type: Literal["image_url"]
    image_url: PictureAddress


ContentPart = Annotated[TextPart | PicturePart, Field(discriminator="type")]


class Message(Part):
    """One turn. Only a user shows pictures; a system or user turn that says nothing is refused."""

    role: Literal["system", "user", "assistant"]
    content: Text | list[ContentPart]
    name: Text | None = None

    @model_validator(mode="after")
    def check(self) -> "Message":
        pictures = [part for part in self.parts() if isinstance(part, PicturePart)]
        if pictures and self.role != "user":
            raise ValueError(f"a {self.role} message cannot hold pictures")
        if self.role != "assistant" and not pictures and not self.text().strip():
            raise ValueError(f"the {self.role} message is empty: write a question or add a picture")
        return self

    def parts(self) -> list[TextPart | PicturePart]:
        if isinstance(self.content, str):
            return [TextPart(type="text", text=self.content)]
        return self.content

    def text(self) -> str:
        return "".join(part.text for part in self.parts() if isinstance(part, TextPart))


def check_length(messages: list[Message]) -> None:
    """Raises ValueError where the messages of one request hold too much text."""
    if sum(len(message.text()) for message in messages) > MOST_TEXT:
        raise ValueError(f"the messages hold more than {MOST_TEXT:,} characters")
