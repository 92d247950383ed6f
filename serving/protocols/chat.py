"""What a chat request may say: OpenAI's fields and vLLM's own, within the bounds of this server, and nothing else."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from serving.protocols.common import MOST_MESSAGES, Message, Part, PicturePart, Text, check_length
from serving.protocols.structured import ResponseFormat, StructuredOutputs, TextFormat

MOST_WEIGHED = 4_000  # characters of a prompt whose own tokens are weighed
# Clients send these along; they change nothing here and stay here.
KEPT_HERE = frozenset(
    {
        "messages",
        "user",
        "safety_identifier",
        "prompt_cache_key",
        "metadata",
        "store",
        "service_tier",
        "modalities",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
    }
)


def no_tools(tools: list[Any]) -> list[Any]:
    """Raises ValueError for any tool: their calls need a model and a template that were made for them."""
    if tools:
        raise ValueError("the model here calls no tools; leave tools out")
    return tools


class StreamOptions(Part):
    include_usage: bool = False
    continuous_usage_stats: bool | None = None


Stop = Annotated[Text, Field(min_length=1, max_length=200)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenName = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
NoTools = Annotated[list[Any], AfterValidator(no_tools), Field(json_schema_extra={"maxItems": 0})]


class ChatRequest(Part):
    """The body of `POST /v1/chat/completions`. Sampling fields that are not given are left to the model's own."""

    model: Text
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
    logit_bias: Annotated[dict[TokenName, Bias], Field(max_length=300)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    # Not OpenAI's but vLLM's.
    structured_outputs: StructuredOutputs | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=1_000)] | None = None
    include_stop_str_in_output: bool | None = None
    # Tokens that an event carries; where unset, by how fast they come.
    stream_interval: Annotated[int, Field(ge=1, le=1_000)] | None = None
    skip_special_tokens: bool | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    add_generation_prompt: bool | None = None
    # See KEPT_HERE.
    user: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: list[Literal["text"]] | None = None
    tools: NoTools | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def check(self) -> "ChatRequest":
        check_length(self.messages)
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        most = self.max_completion_tokens or self.max_tokens
        if most is not None and (self.min_tokens or 0) > most:
            raise ValueError("min_tokens is larger than max_tokens")
        if self.prompt_logprobs is not None:
            self._check_weighing()
        if self.structured_outputs is not None and self.response_format is not None:
            raise ValueError("give response_format or structured_outputs, not both")
        if self.allowed_token_ids is not None and self.has_form():
            # No token may be both allowed and of the form, and vLLM 0.32 fails then.
            raise ValueError("allowed_token_ids do not go with response_format or structured_outputs")
        return self

    def _check_weighing(self) -> None:
        """Raises ValueError where the tokens of the prompt cannot be weighed.

        For each of them the engine holds a number for every word that it knows, so such prompts are short.
        """
        if self.stream:
            raise ValueError("prompt_logprobs are not streamed; leave stream out")
        pictures = sum(isinstance(part, PicturePart) for message in self.messages for part in message.parts())
        if pictures > 1 or sum(len(message.text()) for message in self.messages) > MOST_WEIGHED:
            raise ValueError(f"prompt_logprobs are given of one picture and {MOST_WEIGHED:,} characters at most")

    def has_form(self) -> bool:
        """Whether the answer is held to a form."""
        is_form = self.response_format is not None and not isinstance(self.response_format, TextFormat)
        return is_form or self.structured_outputs is not None

    def sampling(self) -> dict[str, Any]:
        """The fields that pass to the engine as they are."""
        return self.model_dump(exclude=set(KEPT_HERE), exclude_none=True, by_alias=True)
