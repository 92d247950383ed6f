"""What a chat request may say: OpenAI's fields, the bounds of this server, and nothing else."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from serving.protocols.common import MOST_MESSAGES, Message, Part, Text, check_length


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
        check_length(self.messages)
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self

    def sampling(self) -> dict[str, Any]:
        """The fields that pass to the engine as they are."""
        kept_here = {"messages", "user", "metadata", "store"}
        return self.model_dump(exclude=kept_here, exclude_none=True)
