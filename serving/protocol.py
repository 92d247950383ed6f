"""What a chat request may say: OpenAI's fields, the bounds of this server, and nothing else."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MOST_MESSAGES = 1_000
MOST_TEXT = 1_000_000  # characters in one request


def writable(text: str) -> str:
    """Refuse halves of surrogate pairs: JSON can spell them, but they are no characters and cannot be passed on."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("the text holds half a surrogate pair, which is no character")
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
    name: str | None = None

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


class StreamOptions(Part):
    include_usage: bool = False


Stop = Annotated[Text, Field(min_length=1, max_length=200)]


class ChatRequest(Part):
    """The body of `POST /v1/chat/completions`. Sampling fields that are not given are left to the model's own."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=8)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    # Not OpenAI's but vLLM's, and of use to programs that measure a model.
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    # Clients send these along; they change nothing here.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None

    @model_validator(mode="after")
    def check(self) -> "ChatRequest":
        if sum(len(message.text()) for message in self.messages) > MOST_TEXT:
            raise ValueError(f"the messages hold more than {MOST_TEXT:,} characters")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self

    def sampling(self) -> dict[str, Any]:
        """The fields that pass to the engine as they are."""
        kept_here = {"messages", "user", "metadata", "store"}
        return self.model_dump(exclude=kept_here, exclude_none=True)
