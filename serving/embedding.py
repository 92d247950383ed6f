"""Answer requests for embeddings and classifications with a loaded embedder."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from assistant.images import PictureError, PictureLimits, decode_data_url
from serving.errors import ApiError
from serving.protocols.common import PicturePart, TextPart
from serving.protocols.embeddings import (
    Classification,
    Classifications,
    ClassificationsRequest,
    Embedding,
    Embeddings,
    EmbeddingsRequest,
    EmbeddingUsage,
    Score,
)

if TYPE_CHECKING:
    from torch import Tensor

    from assistant.embeddings import Embedder

# torch and what needs it are imported where they are used: the gateway is up without them.

PICTURES_AT_ONCE = 32


@dataclass(frozen=True)
class Embedded:
    """(B, D) points of unit length on the CPU, and the tokens and patches that were read for them."""

    vectors: "Tensor"
    tokens: int


def embeddings(embedder: "Embedder", body: EmbeddingsRequest, limits: PictureLimits) -> Embeddings:
    """The answer to `body`. Raises ApiError for a picture that cannot be read, or a text that is too long."""
    import torch

    inputs = list(enumerate(body.parts()))
    pictures = {number: part.image_url.url for number, part in inputs if isinstance(part, PicturePart)}
    texts = {number: part.text for number, part in inputs if isinstance(part, TextPart)}
    parts = []
    if texts:
        params = [f"input.{number}" for number in texts]
        parts.append((texts, embed_texts(embedder, list(texts.values()), params, body.truncate)))
    if pictures:
        params = [f"input.{number}" for number in pictures]
        parts.append((pictures, embed_pictures(embedder, list(pictures.values()), params, limits)))
    order = torch.tensor([number for given, _ in parts for number in given])
    vectors = torch.cat([embedded.vectors for _, embedded in parts])[order.argsort()]
    tokens = sum(embedded.tokens for _, embedded in parts)
    data = [
        Embedding(index=number, embedding=_written(vector, body.encoding_format))
        for number, vector in enumerate(vectors)
    ]
    return Embeddings(data=data, model=body.model, usage=EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens))


def classifications(
    embedder: "Embedder",
    body: ClassificationsRequest,
    names: Sequence[str | None],
    model_name: str,
    limits: PictureLimits,
) -> Classifications:
    """The answer to `body`. Raises ApiError for a picture that cannot be read, or a label that is too long."""
    from assistant.naming import TEMPLATES, label_embeddings, label_prompts, label_shares

    templates = body.templates or TEMPLATES
    prompts = [(f"labels.{number}", label_prompts(label, templates)) for number, label in enumerate(body.labels)]
    check_lengths(
        embedder,
        [each for _, of_label in prompts for each in of_label],
        [param for param, of_label in prompts for _ in of_label],
    )
    labels = label_embeddings(embedder.texts, body.labels, templates).cpu()
    params = [f"pictures.{number}" for number in range(len(body.pictures))]
    pictures = embed_pictures(embedder, body.pictures, params, limits).vectors
    data = []
    for number, shares in enumerate(label_shares(embedder, pictures, labels)):
        scores = [
            Score(label=body.labels[place], score=float(shares[place])) for place in shares.argsort(descending=True)
        ]
        data.append(Classification(index=number, name=names[number], label=scores[0].label, scores=scores))
    return Classifications(model=model_name, data=data)


def embed_pictures(embedder: "Embedder", urls: Sequence[str], params: Sequence[str], limits: PictureLimits) -> Embedded:
    """The pictures behind `urls` (data URLs), as `kangaroo search` embeds files; `params` are what errors name."""
    import torch

    rows, columns = embedder.tower.grid(embedder.tower.image_side, embedder.tower.image_side)
    vectors = []
    for start in range(0, len(urls), PICTURES_AT_ONCE):
        batch = slice(start, start + PICTURES_AT_ONCE)
        views = [_opened(embedder, url, param, limits) for url, param in zip(urls[batch], params[batch], strict=True)]
        with torch.inference_mode():
            pooled = embedder.tower(torch.cat(views).to(embedder.device)).pooled
            vectors.append(embedder.of_pooled(pooled).cpu())
    return Embedded(torch.cat(vectors), rows * columns * len(urls))


def _opened(embedder: "Embedder", url: str, param: str, limits: PictureLimits) -> "Tensor":
    from assistant.file_embedding import opened_for

    try:
        view = opened_for(embedder.tower, decode_data_url(url, limits), limits)
        if isinstance(view, PictureError):
            raise view
    except PictureError as error:
        raise ApiError(error.status, f"{param}: {error}", param=param, code="invalid_image") from error
    return view


def embed_texts(embedder: "Embedder", texts: Sequence[str], params: Sequence[str], truncate: bool) -> Embedded:
    """The texts; `params` are what errors name. With `truncate` a text that is too long is cut."""
    tokens = check_lengths(embedder, texts, params, truncate)
    return Embedded(embedder.texts(texts).cpu(), tokens)


def check_lengths(embedder: "Embedder", texts: Sequence[str], params: Sequence[str], truncate: bool = False) -> int:
    """How many tokens of `texts` are read. Raises ApiError for a text that is too long for the text half."""
    most = embedder.model.config.text_config.max_position_embeddings
    lengths = [len(ids) for ids in embedder.tokenizer(list(texts), verbose=False)["input_ids"]]
    for length, param in zip(lengths, params, strict=True):
        if length > most and not truncate:
            message = f"{param}: the text has {length} tokens, and the text tower reads {most}."
            raise ApiError(400, message, param=param, code="text_too_long")
    return sum(min(length, most) for length in lengths)


def _written(vector: "Tensor", encoding: str) -> list[float] | str:
    if encoding == "float":
        return [float(number) for number in vector]
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode("ascii")
