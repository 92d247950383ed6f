"""The chat page: ask about pictures, watch the answer arrive, stop it, try again."""

import asyncio
import html
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fastapi
import gradio as gr
import httpx2
import openai
from gradio.components.chatbot import ExampleMessage
from starlette.middleware import Middleware

from assistant.images import PictureError, open_picture
from assistant.questions import CAPTION_QUESTION
from ui.browser.conversation import Turn, to_gradio, to_openai
from ui.browser.look import CSS, ContentRule, page_theme

EXAMPLES_FOLDER = Path(__file__).parent / "examples"
# Rendered with training/data/scenes.py from seeds that are never trained on.
EXAMPLES = (
    ("shapes.png", "What is in this picture?"),
    ("count.png", "How many diamonds are in the picture?"),
    ("word.png", "What does it say?"),
    ("chart.png", "What colour is the tallest bar?"),
)
PICTURE_TYPES = [".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"]
UPLOAD_LIMIT = "20mb"

_POLL_SECONDS = 1.0
# Joey writes several hundred tokens a second; a page that redraws for each one only gets slower.
_REDRAW_SECONDS = 0.05
_STATE_WORDS = {
    "ready": "Ready",
    "loading": "Starting the engine",
    "dead": "The engine has stopped",
    "stopped": "The engine has stopped",
    "unreachable": "The server does not answer",
}


@dataclass(frozen=True)
class Status:
    """What the engine is doing: `state` is loading, ready, dead, stopped or unreachable; `reason` says more."""

    state: str
    reason: str = ""


@dataclass(frozen=True)
class Sampling:
    """Of which model answers are drawn, and how."""

    temperature: float
    top_p: float
    max_tokens: int
    model: str


class PictureBox(gr.MultimodalTextbox):
    """A message box whose files come from the visitor's machine only.

    Gradio would fetch an address given in place of an uploaded file; a visitor must not send our server anywhere.
    """

    # Gradio's own mark for a component that is drawn as its parent is.
    is_template = True

    async def async_move_resource_to_block_cache(self, url_or_file_path: str | Path | None) -> str | None:
        if str(url_or_file_path).startswith(("http://", "https://")):
            raise gr.Error("Upload the picture itself; addresses are not fetched.")
        return await super().async_move_resource_to_block_cache(url_or_file_path)


class Answerer:
    """Speaks to the gateway for the page: the health of the engine, and streamed answers."""

    def __init__(self, api_url: str, api_key: str | None, model_name: str) -> None:
        """`api_url` ends in /v1, as for every OpenAI client; `api_key` may be None when the gateway asks for none."""
        self.model_name = model_name
        # The gateway runs beside the page: a proxy from the environment must not get between them.
        self._http = openai.DefaultAsyncHttpxClient(trust_env=False)
        self._health_url = api_url.rstrip("/").removesuffix("/v1") + "/health"
        # No silent second tries: the reader sees the cause and decides.
        self._client = openai.AsyncOpenAI(
            base_url=api_url, api_key=api_key or "none", max_retries=0, http_client=self._http
        )

    async def status(self) -> Status:
        """Asks the gateway how the engine is; a gateway that does not answer is a state too."""
        try:
            response = await self._http.get(self._health_url, timeout=5.0)
            engine = response.json()["engine"]
            return Status(str(engine["state"]), str(engine.get("reason") or ""))
        except httpx2.HTTPError as error:
            return Status("unreachable", str(error) or type(error).__name__)
        except (ValueError, KeyError, TypeError):
            return Status("unreachable", f"unexpected answer from {self._health_url} (HTTP {response.status_code})")

    async def models(self, authorization: str | None = None) -> list[str]:
        """The models that this visitor may ask, by name, the base first; it alone where the gateway says nothing."""
        headers = {"Authorization": authorization} if authorization else None
        try:
            listed = await self._client.models.list(extra_headers=headers)
        except (openai.APIError, httpx2.HTTPError):
            return [self.model_name]
        return [model.id for model in listed.data]

    async def stream(
        self, turns: Sequence[Turn], sampling: Sampling, authorization: str | None = None
    ) -> AsyncIterator[str]:
        """Yields the pieces of the answer to the last turn.

        With `authorization`, the visitor's own header, the gateway counts the request as that visitor's.
        Closing this iterator closes the HTTP response, which makes the gateway abort the request in the engine.
        Raises `openai.APIError` and `httpx2.HTTPError`, and `OSError` when a picture's file is gone.
        """
        messages: Any = await asyncio.to_thread(to_openai, turns)
        stream = await self._client.chat.completions.create(
            model=sampling.model,
            messages=messages,
            stream=True,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            extra_headers={"Authorization": authorization} if authorization else None,
        )
        async with stream:
            async for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content:
                    yield chunk.choices[0].delta.content


def explain(error: openai.APIError | httpx2.HTTPError | OSError) -> str:
    """The cause of a failed answer in words for the reader: what the server said, where it said something."""
    if isinstance(error, openai.APIStatusError):
        said = error.body.get("message") if isinstance(error.body, dict) else None
        return str(said or error.message)
    if isinstance(error, openai.APIConnectionError | httpx2.HTTPError):
        return "The connection to the server broke off. Is it still running?"
    return str(error)


def check_message(question: str, files: Sequence[str]) -> str:
    """What is wrong with a message before it is sent, in words for its writer; empty when nothing is."""
    for path in files:
        try:
            open_picture(Path(path), name=Path(path).name)
        except PictureError as error:
            return str(error)
    if not question.strip() and not files:
        return "Type a question, or add a picture."
    return ""


def show_status(status: Status) -> str:
    """The status line as HTML."""
    words = _STATE_WORDS.get(status.state, status.state)
    if status.reason and status.state != "ready":
        words += f": {status.reason}"
    light = '<i class="light"></i>'
    return f'<span class="state {html.escape(status.state)}" role="status">{light}{html.escape(words)}</span>'


class ChatPage:
    """The parts of the page and what happens when they are used.

    Handlers that answer give new values for `outputs`: the turns (kept on the server; the browser's copy is never
    read back), the chat, the message box and the timer that asks for the engine's state.
    """

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer
        self.turns = gr.State([])
        self.timer = gr.Timer(_POLL_SECONDS)
        self._build_header()
        self._build_chat()
        self._build_settings()
        gr.Markdown("Answers can be wrong. Pictures stay on the machine that runs this page.", elem_id="footer")
        self.outputs = [self.turns, self.chat, self.box, self.timer]

    def _build_header(self) -> None:
        with gr.Row(elem_id="header"):
            gr.Markdown("# Kangaroo\nChat about your own pictures.", elem_id="title")
            self.status = gr.HTML(show_status(Status("loading")), elem_id="status", container=False, padding=False)

    def _build_chat(self) -> None:
        self.chat = gr.Chatbot(
            elem_id="chat",
            label="Conversation",
            show_label=False,
            layout="bubble",
            buttons=["copy"],
            feedback_options=None,
            group_consecutive_messages=False,
            placeholder="### Drop a picture below and ask about it\nor start from one of these",
            examples=[_example_message(file, question) for file, question in EXAMPLES],
        )
        self.box = PictureBox(
            elem_id="box",
            label="Your message",
            show_label=False,
            sources=["upload"],
            file_count="multiple",
            file_types=PICTURE_TYPES,
            placeholder="Ask, drop or paste pictures",
            max_plain_text_length=100_000,
            autofocus=True,
        )

    def _build_settings(self) -> None:
        with gr.Accordion("Settings", open=False, elem_id="settings") as self.settings_box:
            base = self._answerer.model_name
            self.model = gr.Dropdown(
                [base], value=base, label="Model", visible=False, filterable=False, elem_id="model",
                info="The base, or what was taught on top of it.",
            )  # fmt: skip
            temperature = gr.Slider(
                0.0, 2.0, value=0.0, step=0.05, label="Temperature",
                info="0 gives the likeliest answer, the same each time. Higher is more varied, and more often wrong.",
            )  # fmt: skip
            top_p = gr.Slider(
                0.05, 1.0, value=1.0, step=0.05, label="Top-p",
                info="Draw only from the likeliest words that make up this share. Matters above temperature 0.",
            )  # fmt: skip
            max_tokens = gr.Slider(
                1, 1024, value=256, step=1, label="Longest answer, in tokens",
                info="A token is about three quarters of a word. The answer is cut off there.",
            )  # fmt: skip
        self.settings = [temperature, top_p, max_tokens, self.model]

    async def ask(
        self,
        message: dict[str, Any],
        turns: list[Turn],
        temperature: float,
        top_p: float,
        max_tokens: int,
        model: str,
        visit: gr.Request,
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Answers what is in the box. A message that cannot be sent stays there, with the reason said beside it."""
        question, files = message.get("text") or "", message.get("files") or []
        wrong = await asyncio.to_thread(check_message, question, files)
        if wrong:
            gr.Warning(wrong, title="Not sent", duration=12)
            yield _keep(4)
            return
        turn = Turn(question.strip() or CAPTION_QUESTION, tuple(Path(path) for path in files))
        sampling = Sampling(temperature, top_p, int(max_tokens), model)
        async for update in self._answer([*turns, turn], sampling, visit, clear_box=True):
            yield update

    async def ask_example(
        self,
        chosen: gr.SelectData,
        turns: list[Turn],
        temperature: float,
        top_p: float,
        max_tokens: int,
        model: str,
        visit: gr.Request,
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Asks the chosen example. Only its number is taken from the browser, never a path."""
        file, question = EXAMPLES[int(chosen.index)]
        turn = Turn(question, (EXAMPLES_FOLDER / file,))
        sampling = Sampling(temperature, top_p, int(max_tokens), model)
        async for update in self._answer([*turns, turn], sampling, visit):
            yield update

    async def retry(
        self, turns: list[Turn], temperature: float, top_p: float, max_tokens: int, model: str, visit: gr.Request
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Asks the last question again, with the settings as they are now."""
        if not turns:
            yield _keep(4)
            return
        again = [*turns[:-1], replace(turns[-1], answer="", problem="", stopped=False)]
        sampling = Sampling(temperature, top_p, int(max_tokens), model)
        async for update in self._answer(again, sampling, visit):
            yield update

    async def _answer(
        self, turns: list[Turn], sampling: Sampling, visit: gr.Request, clear_box: bool = False
    ) -> AsyncIterator[tuple[Any, ...]]:
        earlier, turn = turns[:-1], turns[-1]
        busy: dict[str, Any] = {"submit_btn": False, "stop_btn": True}
        box = gr.update(value=None, **busy) if clear_box else gr.update(**busy)
        yield turns, to_gradio(turns), box, gr.skip()
        drawn = 0.0
        pieces = self._answerer.stream(turns, sampling, visit.headers.get("authorization"))
        try:
            async for piece in pieces:
                turn = replace(turn, answer=turn.answer + piece)
                if time.monotonic() - drawn >= _REDRAW_SECONDS:
                    drawn = time.monotonic()
                    yield [*earlier, turn], to_gradio([*earlier, turn]), gr.skip(), gr.skip()
            if not turn.answer:
                turn = replace(turn, problem="The model ended its answer without a word.")
        except (openai.APIError, httpx2.HTTPError, OSError) as error:
            turn = replace(turn, problem=explain(error))
            if isinstance(error, openai.BadRequestError) and earlier:
                turn = replace(turn, problem=f"{turn.problem} Has it grown too long? Clear starts anew.")
        finally:
            # Stop and a closed tab end this generator at a yield or an await: either way the request ends with it.
            await pieces.aclose()  # type: ignore[attr-defined]
        # After a failure the status line may have something to say again.
        timer = gr.Timer(active=True) if turn.problem else gr.skip()
        yield [*earlier, turn], to_gradio([*earlier, turn]), _idle_box(), timer

    def stop(self, turns: list[Turn]) -> tuple[Any, ...]:
        """Keeps what had arrived when the reader pressed stop."""
        stopped = [*turns[:-1], replace(turns[-1], stopped=True)] if turns else turns
        return stopped, to_gradio(stopped), _idle_box(), gr.skip()

    def clear(self) -> tuple[Any, ...]:
        """Forgets the conversation; what is being typed stays."""
        return [], [], _idle_box(), gr.skip()

    async def watch(self) -> tuple[str, Any]:
        """Shows the engine's state, and stops asking once it is ready."""
        status = await self._answerer.status()
        return show_status(status), gr.Timer(active=status.state != "ready")

    async def offer_models(self, chosen: str, visit: gr.Request) -> Any:
        """The models that there are now, to choose from where there are several; the base for one that is gone."""
        names = await self._answerer.models(visit.headers.get("authorization"))
        kept = chosen if chosen in names else self._answerer.model_name
        return gr.update(choices=names, value=kept, visible=len(names) > 1)

    def connect(self, page: gr.Blocks) -> None:
        """Binds the handlers. None of them is part of a public API: programs use the gateway's."""
        shared: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        answers: dict[str, Any] = {"outputs": self.outputs, "concurrency_limit": 32, **shared}
        running: list[Any] = [
            self.box.submit(self.ask, [self.box, self.turns, *self.settings], **answers),
            self.chat.example_select(self.ask_example, [self.turns, *self.settings], **answers),
            self.chat.retry(self.retry, [self.turns, *self.settings], **answers),
        ]
        self.box.stop(self.stop, [self.turns], self.outputs, cancels=running, queue=False, **shared)
        self.chat.clear(self.clear, None, self.outputs, cancels=running, queue=False, **shared)
        watched: dict[str, Any] = {"outputs": [self.status, self.timer], "queue": False, **shared}
        self.timer.tick(self.watch, None, **watched)
        page.load(self.watch, None, **watched)
        offered: dict[str, Any] = {"inputs": [self.model], "outputs": [self.model], "queue": False, **shared}
        self.settings_box.expand(self.offer_models, **offered)
        page.load(self.offer_models, **offered)


def _example_message(file: str, question: str) -> ExampleMessage:
    return {"icon": str(EXAMPLES_FOLDER / file), "display_text": question, "text": question}


def _idle_box() -> Any:
    return gr.update(submit_btn=True, stop_btn=False)


def _keep(count: int) -> tuple[Any, ...]:
    return tuple(gr.skip() for _ in range(count))


def build_page(api_url: str, api_key: str | None, model_name: str) -> gr.Blocks:
    """The chat page, speaking to the OpenAI-compatible API at `api_url` (which ends in /v1)."""
    with gr.Blocks(title="Kangaroo", analytics_enabled=False, fill_height=True, delete_cache=(3600, 86400)) as page:
        ChatPage(Answerer(api_url, api_key, model_name)).connect(page)
    return page


def attach_page(app: fastapi.FastAPI, page: gr.Blocks) -> None:
    """Mounts the page on `app` at its root; routes that `app` already has come first."""
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        footer_links=[],
        run_history=False,
        allowed_paths=[str(EXAMPLES_FOLDER)],
        max_file_size=UPLOAD_LIMIT,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        theme=page_theme(),
        css=CSS,
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None, "middleware": [Middleware(ContentRule)]},
    )
