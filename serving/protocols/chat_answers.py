"""What answers of `/v1/chat/completions` and `/v1/responses` hold: the engine's own, of which these fields are sure."""

from typing import Any, Literal

from pydantic import BaseModel

from serving.protocols.captions import Usage


class ChatAnswerMessage(BaseModel):
    """What the model said."""

    role: str
    content: str | None = None


class ChatChoice(BaseModel):
    """One of the `n` answers."""

    index: int
    message: ChatAnswerMessage
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None


class ChatAnswer(BaseModel):
    """The answer of `POST /v1/chat/completions` where it is not streamed."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class ResponsesAnswer(BaseModel):
    """The answer of `POST /v1/responses` where it is not streamed."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None = None
