"""Reads answers, and the likelihood of given ones, out of what a server sent; anything else is nonsense."""

import json
from typing import Any


class NonsenseError(ValueError):
    """A server's answer that is none; the message quotes it."""


def answer_in(body: str) -> str:
    """The words of a chat completion. Raises NonsenseError where `body` is none."""
    try:
        content = _read(body)["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise NonsenseError(f"something else: {body!r:.200}") from error
    if not isinstance(content, str):
        raise NonsenseError(f"a message without words: {body!r:.200}")
    return content.strip()


def answer_likelihood(before: str, whole: str) -> tuple[float, int]:
    """The log-likelihood in nats of an answer and its end, and the number of their tokens.

    Args:
        before: the completion of the question alone, its prompt ending where the answer begins.
        whole: the completion of the question with the answer and the end of its turn.

    Both are vLLM's, asked with `prompt_logprobs: 0`. Raises NonsenseError where the log-probabilities are missing, or
    the second prompt does not begin as the first one.
    """
    prefix, tokens = _prompt(before), _prompt(whole)
    if [one["id"] for one in prefix] != [one["id"] for one in tokens[: len(prefix)]]:
        raise NonsenseError("a prompt with an answer that does not begin as the prompt without")
    answer = tokens[len(prefix) :]
    while answer and not answer[-1]["text"].strip():  # a line break behind the end of a turn is nobody's answer
        answer.pop()
    if not answer:
        raise NonsenseError("a prompt in which the answer does not stand")
    return sum(one["logprob"] for one in answer), len(answer)


def _prompt(body: str) -> list[dict[str, Any]]:
    """Id, log-probability and text of each prompt token but the first."""
    found = _read(body).get("prompt_logprobs")
    if not isinstance(found, list):
        raise NonsenseError("an answer without prompt_logprobs")
    tokens = []
    try:
        for place in found[1:]:
            ((id, said),) = place.items()
            tokens.append({"id": id, "logprob": float(said["logprob"]), "text": str(said["decoded_token"])})
    except (AttributeError, ValueError, KeyError, TypeError) as error:
        raise NonsenseError("prompt_logprobs that are not one token with its logprob at each place") from error
    return tokens


def _read(body: str) -> dict[str, Any]:
    try:
        content = json.loads(body)
    except ValueError as error:
        raise NonsenseError(f"no JSON: {body!r:.200}") from error
    if not isinstance(content, dict):
        raise NonsenseError(f"something else: {body!r:.200}")
    return content
