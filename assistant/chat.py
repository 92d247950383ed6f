"""Turn messages into token ids and say which of them are supervised; the only code that knows templates."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

IMAGE_TOKEN = "<image>"
BEGIN_TOKEN = "<s>"
END_TOKEN = "</s>"
PAD_TOKEN = "<pad>"
UNKNOWN_TOKEN = "<unk>"
USER_TOKEN = "<|user|>"
ASSISTANT_TOKEN = "<|assistant|>"
SYSTEM_TOKEN = "<|system|>"
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
    """T token ids of one conversation and, for each, whether the loss looks at it."""

    ids: list[int]
    supervised: list[bool]


def user_message(text: str, pictures: int = 0) -> dict[str, Any]:
    """One user turn with `pictures` picture places before its words."""
    return {"role": "user", "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}]}


def assistant_message(text: str) -> dict[str, Any]:
    """One answer of the assistant."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], tokens_per_picture: int
) -> EncodedConversation:
    """Render `messages` with the tokenizer's own template, tokenise, and widen each picture place.

    The supervised mask comes from the template's own generation spans, never from searching for words in the text.
    Raises ConversationError when no token is supervised or the template lost or invented a picture.
    """
    pictures = sum(
        part["type"] == "image" for m in messages if not isinstance(m["content"], str) for part in m["content"]
    )
    rendered, spans = render_jinja_template(
        [list(messages)], chat_template=tokenizer.chat_template, return_assistant_tokens_mask=True
    )
    encoding = tokenizer(rendered[0], add_special_tokens=False, return_offsets_mapping=True)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if encoding["input_ids"].count(image_id) != pictures:
        raise ConversationError(
            f"{pictures} pictures are given but {IMAGE_TOKEN} stands elsewhere in: {rendered[0][:200]}"
        )
    ids: list[int] = []
    supervised: list[bool] = []
    for token, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
        repeat = tokens_per_picture if token == image_id else 1
        ids += [token] * repeat
        supervised += [any(first <= start and end <= last for first, last in spans[0])] * repeat
    if not any(supervised):
        raise ConversationError(f"nothing is supervised in this conversation (no assistant turn?): {rendered[0][:200]}")
    return EncodedConversation(ids, supervised)
