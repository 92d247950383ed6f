"""Name pictures with labels that nobody taught: each label in a few wordings, and the nearest one wins."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from assistant.embeddings import Embedder

# The first is what training says of a label; the others keep one wording from deciding.
TEMPLATES = (
    "A photo of a {}.",
    "A picture of a {}.",
    "A close photo of a {}.",
    "There is a {} in the picture.",
    "A {}.",
)


def label_prompts(label: str, templates: Sequence[str] = TEMPLATES) -> list[str]:
    """The label in each template, underscores read as spaces. Raises ValueError for a template without `{}`."""
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"the template {template!r} has no {{}} for the label")
    return [template.replace("{}", label.replace("_", " ")) for template in templates]


def label_embeddings(
    embed_texts: Callable[[Sequence[str]], Tensor], labels: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> Tensor:
    """(C, D) of unit length: for each of C labels the mean over the embeddings of its prompts.

    As CLIP ensembles them (Radford et al. 2021, section 3.1.4). `embed_texts` gives unit length, (T, D) for T texts.
    """
    prompts = [prompt for label in labels for prompt in label_prompts(label, templates)]
    embedded = embed_texts(prompts)
    return functional.normalize(embedded.unflatten(0, (len(labels), len(templates))).mean(1), dim=-1)


@torch.inference_mode()
def label_shares(embedder: Embedder, pictures: Tensor, labels: Tensor) -> Tensor:
    """(B, C) how likely each of C labels is of each picture, among these labels: rows sum to 1.

    A softmax over cosines at the model's own temperature, for SigLIP too, whose sigmoids do not compare labels.

    Args:
        pictures: (B, D) embeddings of pictures, of unit length.
        labels: (C, D), from `label_embeddings`.
    """
    return (embedder.model.logit_scale.exp() * pictures @ labels.T.to(pictures)).softmax(-1)
