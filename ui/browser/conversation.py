"""What was said on the page so far: kept on the server, shown by Gradio, sent to the API."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from assistant.images import FORMATS

_STOPPED = "Stopped before the answer began."


@dataclass(frozen=True)
class Turn:
    """One question with its pictures, and what came back.

    `problem` says in words why there is no (whole) answer; `stopped` that the reader cut it short.
    """

    question: str
    pictures: tuple[Path, ...] = ()
    answer: str = ""
    problem: str = ""
    stopped: bool = False


def to_gradio(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The turns as `gr.Chatbot` shows them. What a person typed is shown as typed, never as markup."""
    shown: list[dict[str, Any]] = []
    for turn in turns:
        pictures = [{"path": str(path), "alt_text": path.name} for path in turn.pictures]
        shown.append({"role": "user", "content": [*pictures, html.escape(turn.question, quote=False)]})
        if turn.answer:
            shown.append({"role": "assistant", "content": turn.answer})
        if turn.problem:
            text = (
                f"⚠️ **No answer.** {html.escape(turn.problem, quote=False)}\n\nYour question is kept: press ↻ to retry."
            )
            shown.append({"role": "assistant", "content": text})
        elif turn.stopped and not turn.answer:
            shown.append({"role": "assistant", "content": f"*{_STOPPED}*"})
    return shown


def to_openai(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The turns as OpenAI chat messages, pictures as data URLs before their question.

    Earlier turns that got no answer are left out; the last turn is the question to answer, so only its question is
    sent. Raises `FileNotFoundError` when a picture's file is gone.
    """
    messages: list[dict[str, Any]] = []
    for turn in turns[:-1]:
        if turn.answer:
            messages += [_question_message(turn), {"role": "assistant", "content": turn.answer}]
    return [*messages, _question_message(turns[-1])]


def _question_message(turn: Turn) -> dict[str, Any]:
    pictures = [{"type": "image_url", "image_url": {"url": _data_url(path)}} for path in turn.pictures]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": turn.question}]}


def _data_url(path: Path) -> str:
    """The file's own bytes: the gateway opens and checks them as it does for every client."""
    with Image.open(path, formats=FORMATS) as image:
        media_type = Image.MIME[image.format or "PNG"]
    return f"data:{media_type};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
