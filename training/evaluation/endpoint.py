"""Puts a task's questions to an OpenAI-compatible server, several at once, and never takes a failure for an answer."""

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import aiohttp
import openai

from assistant.images import encode_data_url
from training.evaluation.predictions import Prediction
from training.evaluation.prompt_likelihood import NonsenseError, answer_in, answer_likelihood
from training.evaluation.task_items import Item, TaskItems

STOP_AFTER = 8  # questions that failed one after the other: something is wrong with the server, not with a question
URLS_KEPT = 64  # pictures as they are sent; questions about one picture stand together
# What no other question would fare better with: a wrong key, a wrong name of the model.
HOPELESS = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)

Keep = Callable[[Prediction], None]


class EndpointError(RuntimeError):
    """A server that cannot be asked any further; the message says why and the way out."""


@dataclass(frozen=True)
class EndpointSettings:
    """Where the server is and how it is asked. Failures that may pass (429, 5xx, time-outs) are tried again."""

    url: str  # with its /v1
    model: str | None = None  # the only one of the server where None
    key: str = field(default="none", repr=False)
    at_once: int = 8
    timeout: float = 120.0  # seconds of one try
    retries: int = 5  # each after twice the time of the one before, from half a second to 8, or as the server asks


class Endpoint:
    """A model behind an OpenAI-compatible server."""

    def __init__(self, settings: EndpointSettings) -> None:
        """Asks the server which models it has. Raises EndpointError where it cannot be reached or has not `model`."""
        self.settings = settings
        self.model = _model_of(settings)

    def predict(self, asked: TaskItems, items: Sequence[Item], keep: Keep) -> None:
        """Answer `items`, each prediction handed to `keep` as soon as it is there, failures with their reason.

        Raises EndpointError where the server is down, refuses the key or the model, cannot weigh given texts, or
        `STOP_AFTER` questions fail in a row.
        """
        if asked.task.kind == "perplexity":
            raise EndpointError("perplexity needs a model here in the process: measure it without --endpoint")
        try:
            asyncio.run(_Asking(self.settings, self.model, asked, keep).all_of(items))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None


class _Asking:
    """One run over the items of a task."""

    def __init__(self, settings: EndpointSettings, model: str, asked: TaskItems, keep: Keep) -> None:
        self.settings, self.model, self.asked, self.keep = settings, model, asked, keep
        self.failed_in_a_row = 0
        self.url_of = lru_cache(URLS_KEPT)(lambda place: encode_data_url(asked.pictures[place]))

    async def all_of(self, items: Sequence[Item]) -> None:
        waiting = iter(items)
        # By aiohttp a question costs the client two thirds of what it does by httpx.
        client = openai.AsyncOpenAI(**_options(self.settings), http_client=openai.DefaultAioHttpClient())
        async with client, asyncio.TaskGroup() as group:
            for _ in range(self.settings.at_once):
                group.create_task(self._work(client, waiting))

    async def _work(self, client: openai.AsyncOpenAI, waiting: Iterator[Item]) -> None:
        for item in waiting:
            prediction = await self._predicted(client, item)
            self.keep(prediction)
            self.failed_in_a_row = 0 if prediction.failed is None else self.failed_in_a_row + 1
            if self.failed_in_a_row >= STOP_AFTER:
                raise EndpointError(f"{STOP_AFTER} questions in a row failed, the last so: {prediction.failed}")

    async def _predicted(self, client: openai.AsyncOpenAI, item: Item) -> Prediction:
        try:
            if self.asked.task.by_likelihood:
                return await self._weighed(client, item)
            question = await self._message(item)
            text = await self._post(client, [question], max_tokens=self.asked.task.max_tokens)
            return Prediction(id=item.id, answer=answer_in(text))
        except HOPELESS as error:
            raise EndpointError(f"{self.settings.url} refuses: {_said(error)}") from error
        except openai.APITimeoutError as error:
            if _hung_up(error):
                raise EndpointError(_unreachable(self.settings, error)) from error
            return Prediction(id=item.id, failed=f"no answer within {self.settings.timeout:g} seconds")
        except openai.APIConnectionError as error:
            raise EndpointError(_unreachable(self.settings, error)) from error
        except openai.APIError as error:
            return Prediction(id=item.id, failed=_said(error))
        except NonsenseError as error:
            return Prediction(id=item.id, failed=f"no answer, but {error}")

    async def _weighed(self, client: openai.AsyncOpenAI, item: Item) -> Prediction:
        """The likelihood of each choice, as the server's own log-probabilities of a prompt that ends with it."""
        question = await self._message(item)
        more = {"max_tokens": 1, "prompt_logprobs": 0}
        closed = {**more, "add_generation_prompt": False}
        try:
            before = await self._post(client, [question], **more)
            found = []
            for choice in item.choices:
                answered = [question, {"role": "assistant", "content": choice}]
                found.append(answer_likelihood(before, await self._post(client, answered, **closed)))
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            raise EndpointError(_weighs_nothing(self.settings, _said(error))) from error
        except NonsenseError as error:
            raise EndpointError(_weighs_nothing(self.settings, str(error))) from error
        return Prediction(id=item.id, likelihoods=[one[0] for one in found], tokens=[one[1] for one in found])

    async def _message(self, item: Item) -> dict[str, Any]:
        parts: list[dict[str, Any]] = [{"type": "text", "text": item.question}]
        if item.picture is not None:
            url = await asyncio.to_thread(self.url_of, item.picture)
            parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
        return {"role": "user", "content": parts}

    async def _post(self, client: openai.AsyncOpenAI, messages: list[Any], **more: Any) -> str:
        """The body of the answer, whatever it is: the client itself would pass nonsense on as if it were an answer.

        `chat.completions.create` would look at each field of the request first, which takes a quarter of its time.
        """
        asked = {"model": self.model, "messages": messages, "temperature": 0, **more}
        return await client.post("/chat/completions", body=asked, cast_to=str)


def _options(settings: EndpointSettings) -> dict[str, Any]:
    return {
        "base_url": settings.url,
        "api_key": settings.key,
        "timeout": settings.timeout,
        "max_retries": settings.retries,
    }


def _model_of(settings: EndpointSettings) -> str:
    """The model to ask for. Raises EndpointError where it is not there, or several are and none is named."""
    try:
        with openai.OpenAI(**_options(settings)) as client:
            body = json.loads(client.models.with_raw_response.list().text)
        names = [str(model["id"]) for model in body["data"]]
    except openai.NotFoundError as error:
        raise EndpointError(f"{settings.url}/models is not there; an address ends in /v1 as a rule") from error
    except HOPELESS as error:
        raise EndpointError(
            f"{settings.url} refuses: {_said(error)}; name the key's variable: --api-key-env"
        ) from error
    except openai.APIConnectionError as error:
        raise EndpointError(_unreachable(settings, error)) from error
    except openai.APIError as error:
        raise EndpointError(f"{settings.url}/models: {_said(error)}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise EndpointError(
            f"{settings.url}/models gives no list of models: is it an OpenAI-compatible server?"
        ) from error
    if settings.model is None and len(names) == 1:
        return names[0]
    if settings.model in names:
        return str(settings.model)
    wanted = "name one of its models" if settings.model is None else f"{settings.url} has no model {settings.model}"
    raise EndpointError(f"{wanted}: {', '.join(names[:20]) or 'it has none'}")


def _said(error: openai.APIError) -> str:
    status = getattr(error, "status_code", None)
    message = " ".join(str(error.message).split())[:300]
    return f"status {status}: {message}" if status else message


def _hung_up(error: openai.APITimeoutError) -> bool:
    """Whether the server closed the connection, which openai's client by aiohttp takes for a time-out too."""
    cause = error.__cause__.__cause__ if error.__cause__ else None
    return isinstance(cause, aiohttp.ClientConnectionError) and not isinstance(cause, TimeoutError)


def _unreachable(settings: EndpointSettings, error: Exception) -> str:
    tries = f"{settings.retries + 1} tries" if settings.retries else "1 try"
    return f"{settings.url} cannot be reached in {tries} ({error.__cause__ or error})"


def _weighs_nothing(settings: EndpointSettings, said: str) -> str:
    return (
        f"{settings.url} does not weigh given texts ({said}): the kind choices needs prompt_logprobs, as vLLM has. "
        "Or measure the model here in the process, without --endpoint"
    )
