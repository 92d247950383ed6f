"""Turn messages into token ids and say which of them are supervised; the only code that knows templates."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import jinja2, render_jinja_template

from assistant.plain_text import PlainText, SpecialTextError

IMAGE_TOKEN = "<image>"
BEGIN_TOKEN = "<s>"
END_TOKEN = "</s>"
PAD_TOKEN = "<pad>"
UNKNOWN_TOKEN = "<unk>"
USER_TOKEN = "<|user|>"
ASSISTANT_TOKEN = "<|assistant|>"
SYSTEM_TOKEN = "<|system|>"
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
SPECIAL_TOKENS = (PAD_TOKEN, BEGIN_TOKEN, END_TOKEN, IMAGE_TOKEN, USER_TOKEN, ASSISTANT_TOKEN, SYSTEM_TOKEN)

# Pictures stand before the words of their message, as in LLaVA-1.5. The `generation` block marks what is supervised:
# the answer and the end of the turn, so that generation knows where to stop.
JOEY_TEMPLATE = (
    "{{ '<s>' }}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{ '<|assistant|>' }}"
    "{%- generation -%}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{%- for part in message['content'] -%}{{ part['text'] }}{%- endfor -%}{%- endif -%}"
    "{{ '</s>' }}"
    "{%- endgeneration -%}"
    "{%- else -%}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}"
    "{%- for part in message['content'] if part['type'] != 'text' -%}{{ '<image>' }}{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}"
    "{%- endif -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)


class ConversationError(ValueError):
    """A conversation that cannot be trained on or answered; the message says which and why."""


@dataclass(frozen=True)
class EncodedConversation:
    """T token ids of one conversation and, for each, whether the loss looks at it; and the tokens of each picture."""

    ids: list[int]
    supervised: list[bool]
    pictures: tuple[int, ...] = ()


def user_message(text: str, pictures: int = 0) -> dict[str, Any]:
    """One user turn with `pictures` picture places before its words."""
    return {"role": "user", "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}]}


def assistant_message(text: str) -> dict[str, Any]:
    """One answer of the assistant."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], tokens_per_picture: int | Sequence[int]
) -> EncodedConversation:
    """Render `messages` with the tokenizer's own template, tokenise, and widen each picture place.

    `tokens_per_picture` is one number, or one for each picture in their order where they hang on its size.

    The supervised mask comes from the template, never from searching for words in the text: from its `generation`
    blocks, or, where it has none, from what it writes behind its own generation prompt. An answer with
    `"supervised": False` is read and not learned. What people typed is only text: a typed special token is taken apart
    as the served model sees it, see `PlainText`. Where in its message a picture stands is for the template to say.

    Raises ConversationError when no token is supervised, the template lost or invented a picture, or refuses, and
    ValueError where there are not as many numbers as pictures.
    """
    typed = [_plain_message(tokenizer, message) for message in messages]
    try:
        text, spans = render_with_spans(tokenizer, typed)
    except jinja2.TemplateError as error:
        raise ConversationError(f"the chat template of the model refuses this conversation: {error}") from error
    # Not verbose: how long it may be is for the caller to say.
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    pictures = sum(part["type"] == "image" for message in typed for part in _parts(message))
    found = encoding["input_ids"].count(image_id)
    if found != pictures:
        raise ConversationError(f"{pictures} pictures are given and the chat template wrote {found}: {text[:200]}")
    counts = [tokens_per_picture] * pictures if isinstance(tokens_per_picture, int) else list(tokens_per_picture)
    if len(counts) != pictures:
        raise ValueError(f"tokens of {len(counts)} pictures are said, and the conversation has {pictures}")
    places = iter(counts)
    ids: list[int] = []
    supervised: list[bool] = []
    for token, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
        repeat = next(places) if token == image_id else 1
        ids += [token] * repeat
        supervised += [any(first <= start and end <= last for first, last in spans)] * repeat
    if not any(supervised):
        raise ConversationError(f"nothing is supervised in this conversation (no assistant turn?): {text[:200]}")
    return EncodedConversation(ids, supervised, tuple(counts))


def render_with_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]]
) -> tuple[str, list[tuple[int, int]]]:
    """The text that the template makes of `messages`, and where in it the answers stand that are learned.

    Raises ConversationError for a template that rewrites earlier turns, so that nobody can tell answers apart.
    """
    template, special = tokenizer.chat_template, tokenizer.special_tokens_map
    plain = [{key: value for key, value in message.items() if key != "supervised"} for message in messages]
    if not _takes_parts(template, tuple(special.items())):
        plain = [message | {"content": _as_one_text(message)} for message in plain]
    if GENERATION_BLOCK.search(template):
        rendered, found = render_jinja_template(
            [plain], chat_template=template, return_assistant_tokens_mask=True, **special
        )
        text, spans = rendered[0], [tuple(span) for span in found[0]]
    else:
        text = _rendered(template, special, plain)
        spans = [
            _answer_span(tokenizer, text, plain[: number + 1])
            for number, message in enumerate(plain)
            if message["role"] == "assistant"
        ]
    answers = [message for message in messages if message["role"] == "assistant"]
    if all(message.get("supervised", True) for message in answers):
        return text, spans
    if len(spans) != len(answers):
        raise ConversationError("the chat template has not one span for each answer, so none can be left unsupervised")
    return text, [span for span, m in zip(spans, answers, strict=True) if m.get("supervised", True)]


def _answer_span(tokenizer: PreTrainedTokenizerBase, text: str, messages: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """Where the last of `messages`, an answer, stands in `text`, with the token that ends its turn."""
    special = tokenizer.special_tokens_map
    prompt = _rendered(tokenizer.chat_template, special, messages[:-1], add_generation_prompt=True)
    # Behind an earlier turn some templates write an end that is not there when the conversation goes on.
    alone = _rendered(tokenizer.chat_template, special, messages)
    said = "".join(letter for letter, _ in takewhile(lambda pair: pair[0] == pair[1], zip(alone, text, strict=False)))
    if not said.startswith(prompt):
        raise ConversationError(
            "the chat template writes an answer otherwise than it asks for one, so the answer's place is not known; "
            "mark answers in the template with {% generation %} and {% endgeneration %}"
        )
    closed = said.rstrip()
    # A line break behind the end of a turn belongs to the next turn: the model has stopped before it.
    ends_turn = any(closed.endswith(token) for token in tokenizer.all_special_tokens)
    return len(prompt), len(closed if ends_turn else said)


def _rendered(
    template: str, special: dict[str, str], messages: Sequence[dict[str, Any]], add_generation_prompt: bool = False
) -> str:
    rendered, _ = render_jinja_template(
        [list(messages)], chat_template=template, add_generation_prompt=add_generation_prompt, **special
    )
    return rendered[0]


@lru_cache(maxsize=64)
def _takes_parts(template: str, special: tuple[tuple[str, str], ...]) -> bool:
    """Whether `template` reads a list of parts; most language models' read one text."""
    try:
        probe = _rendered(template, dict(special), [user_message("probe", pictures=1)])
    except (jinja2.TemplateError, TypeError):
        return False
    return "probe" in probe and "'type'" not in probe


def _as_one_text(message: dict[str, Any]) -> str:
    """Pictures first, then the words, as vLLM writes a message for a template that reads one text."""
    parts = _parts(message)
    places = [IMAGE_TOKEN for part in parts if part["type"] == "image"]
    return "\n".join([*places, *(part["text"] for part in parts if part["type"] == "text")])


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _plain_message(tokenizer: PreTrainedTokenizerBase, message: dict[str, Any]) -> dict[str, Any]:
    """The message with every special token that was typed taken apart, and neighbouring texts as one."""
    plain = plain_text_of(tokenizer)
    joined: list[dict[str, Any]] = []
    for part in _parts(message):
        # The template joins neighbours: `<ima` and `ge>` must not slip through apart.
        if joined and part["type"] == joined[-1]["type"] == "text":
            joined[-1] = {"type": "text", "text": joined[-1]["text"] + part["text"]}
        else:
            joined.append(part)
    try:
        parts = [part | {"text": plain(part["text"])} if part["type"] == "text" else part for part in joined]
    except SpecialTextError as error:
        raise ConversationError(str(error)) from error
    return message | {"content": parts}


@lru_cache(maxsize=8)
def plain_text_of(tokenizer: PreTrainedTokenizerBase) -> PlainText:
    """What takes special tokens of `tokenizer` apart in typed text."""
    return PlainText(tokenizer.backend_tokenizer, IMAGE_TOKEN)
