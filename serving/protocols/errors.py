"""What every error looks like: OpenAI's error object."""

from typing import Literal

from pydantic import BaseModel


class ErrorObject(BaseModel):
    """What went wrong, in words that may be shown to people; `param` names the field at fault."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """The body of every answer whose status is 400 or more."""

    error: ErrorObject
