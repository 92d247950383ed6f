"""How likely a model here in the process holds given answers to a question, and plain texts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from assistant.answering import Assistant
from assistant.chat import IMAGE_TOKEN, ConversationError, assistant_message, encode_conversation, user_message
from training.data.texts import TextRow, encode_text

CHUNK = 1024  # tokens whose logits are alive at once


@dataclass(frozen=True)
class Weighed:
    """T token ids, and which of them are weighed: those of an answer and of its end, or of a text behind its begin."""

    ids: list[int]
    weighed: list[bool]
    picture: int | None = None  # its place among the pictures given beside


def weigh_answer(assistant: Assistant, question: str, answer: str, picture: int, tokens: int) -> Weighed:
    """The ids of `answer` behind the question as training reads them, the end of the turn with them.

    `tokens` is how many the picture takes, see `see`. Raises ConversationError where the template does not show the
    picture.
    """
    messages = [user_message(question, pictures=1), assistant_message(answer)]
    encoded = encode_conversation(assistant.processor.tokenizer, messages, tokens)
    return Weighed(encoded.ids, encoded.supervised, picture)


def weigh_text(assistant: Assistant, text: str) -> Weighed:
    """The tokens of a document as language pretraining reads it. Raises ConversationError where it is too long."""
    ids = encode_text(assistant.processor.tokenizer, TextRow("", None, text), len(text))
    most = assistant.model.config.text_config.max_position_embeddings
    if len(ids) > most:
        raise ConversationError(f"the text has {len(ids)} tokens, and the model has {most} positions")
    return Weighed(ids, [False] + [True] * (len(ids) - 1))


@torch.inference_mode()
def see(assistant: Assistant, pictures: Sequence[Image.Image]) -> list[Tensor]:
    """What stands in the places of each picture's tokens, (n, W): transformers' own image features."""
    model = assistant.model
    read = dict(assistant.processor.image_processor(images=list(pictures), return_tensors="pt").to(model.device))
    seen = model.get_image_features(**read | {"pixel_values": read["pixel_values"].to(model.dtype)}).pooler_output
    return [one.reshape(-1, one.shape[-1]) for one in seen]


@torch.inference_mode()
def log_likelihoods(assistant: Assistant, batch: Sequence[Weighed], seen: Sequence[Tensor]) -> list[tuple[float, int]]:
    """For each of `batch` the sum of log p (nats) of its weighed tokens, each given all before it, and their number.

    `seen` is what `see` made of the pictures: each goes through the tower once, however many of `batch` ask about it.
    """
    model, device = assistant.model, assistant.model.device
    ids = pad_sequence([torch.tensor(one.ids) for one in batch], batch_first=True).to(device)  # (B, T)
    weighed = pad_sequence([torch.tensor(one.weighed) for one in batch], batch_first=True).to(device)
    lengths = torch.tensor([len(one.ids) for one in batch], device=device)
    attends = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    embedded = model.get_input_embeddings()(ids)
    if seen:
        image_id = assistant.processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        shown = torch.cat([seen[one.picture] for one in batch if one.picture is not None])
        places = ((ids == image_id) & attends)[..., None]
        embedded = embedded.masked_scatter(places, shown.to(embedded.dtype))
    hidden = model.model.language_model(
        inputs_embeds=embedded, attention_mask=attends.long(), use_cache=False
    ).last_hidden_state
    losses = _surprises(hidden[:, :-1][weighed[:, 1:]], model.lm_head.weight, ids[:, 1:][weighed[:, 1:]])
    return [(-float(part.sum()), len(part)) for part in losses.split(weighed[:, 1:].sum(1).tolist())]


def _surprises(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """-log p of each of S targets, in nats: hidden (S, D), head (V, D), targets (S,) -> (S,) float32."""
    parts = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    return torch.cat([cross_entropy((some @ head.T).float(), those, reduction="none") for some, those in parts])
