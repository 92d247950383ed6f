"""What a request to `/v1/responses` may say: OpenAI's newer way to chat, without anything kept on the server."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from serving.protocols.chat import NoTools
from serving.protocols.common import (
    MOST_MESSAGES,
    Message,
    Part,
    PictureAddress,
    PicturePart,
    Text,
    TextPart,
    check_length,
)
from serving.protocols.structured import JsonObjectFormat, Schema, TextFormat

KEPT_HERE = frozenset(
    {
        "input",
        "instructions",
        "user",
        "safety_identifier",
        "prompt_cache_key",
        "metadata",
        "service_tier",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "background",
        "previous_response_id",
        "conversation",
        "truncation",
        "store",
    }
)


def nothing_kept(value: object) -> object:
    """Raises ValueError for what would need earlier answers to be kept here."""
    if value:
        raise ValueError("this server keeps no answers; send the whole conversation as input")
    return value


class InputText(Part):
    type: Literal["input_text"]
    text: Text


class OutputText(Part):
    """A part of an earlier answer; clients send it back as they got it."""

    type: Literal["output_text"]
    text: Text
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputPicture(Part):
    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "low", "high"] | None = None


InputPart = Annotated[InputText | OutputText | InputPicture, Field(discriminator="type")]


class InputMessage(Part):
    """One turn. `id` and `status` of an earlier answer may come along and change nothing."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[InputPart]
    id: str | None = None
    status: Literal["completed", "incomplete", "in_progress"] | None = None
    phase: str | None = None

    def as_chat(self) -> Message:
        """The same turn as chat writes it. Raises ValueError for an empty one, or a picture that no user shows."""
        role: Any = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return Message(role=role, content=self.content)
        return Message(role=role, content=[_as_chat_part(part) for part in self.content])


def _as_chat_part(part: InputText | OutputText | InputPicture) -> TextPart | PicturePart:
    if isinstance(part, InputPicture):
        return PicturePart(type="image_url", image_url=PictureAddress(url=part.image_url))
    return TextPart(type="text", text=part.text)


class SchemaFormat(Part):
    type: Literal["json_schema"]
    name: Annotated[Text, Field(min_length=1, max_length=64)]
    description: Text | None = None
    json_schema: Schema = Field(alias="schema")
    strict: bool | None = None


class TextOptions(Part):
    format: Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None


class ResponsesRequest(Part):
    """The body of `POST /v1/responses`."""

    model: Text
    input: Text | Annotated[list[InputMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    instructions: Text | None = None
    stream: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    text: TextOptions | None = None
    # See KEPT_HERE.
    store: Annotated[bool, Field(description="Nothing is kept here, whatever this says.")] | None = None
    truncation: Literal["disabled"] | None = None
    background: Annotated[bool, AfterValidator(nothing_kept)] | None = None
    previous_response_id: Annotated[str, AfterValidator(nothing_kept)] | None = None
    conversation: Annotated[str | dict[str, Any], AfterValidator(nothing_kept)] | None = None
    user: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "default"] | None = None
    tools: NoTools | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def check(self) -> "ResponsesRequest":
        check_length(self.conversation_so_far())
        return self

    def conversation_so_far(self) -> list[Message]:
        """Instructions and input as messages of a chat. Raises ValueError for a message that says nothing."""
        turns = [InputMessage(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        messages = [turn.as_chat() for turn in turns]
        if self.instructions is not None:
            messages.insert(0, Message(role="system", content=self.instructions))
        return messages

    def sampling(self) -> dict[str, Any]:
        """The fields that pass to the engine as they are."""
        return self.model_dump(exclude=set(KEPT_HERE), exclude_none=True, by_alias=True)
