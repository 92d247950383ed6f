"""Steps of CLIP and SigLIP beside open_clip's CLIP and transformers' own CLIPModel and SiglipModel."""

import copy
import tempfile
from pathlib import Path
from typing import Any, Literal

import open_clip.loss
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor
from transformers import CLIPModel, PreTrainedTokenizerFast

from assistant.towers import TextShape, clip_tokenizer, new_image_processor, new_pair
from scripts.benchmarks.measuring import Pair
from scripts.benchmarks.peer_weights import for_open_clip
from scripts.benchmarks.workbench import Workbench
from training.data.scenes import words_of_scene
from training.objective import Start
from training.objectives import clip, siglip
from training.picture_text import PictureTextObjective
from training.tokenizer import fast_tokenizer, train_sentencepiece

TOKENIZER_WORDS = 640


def open_clip_pair(bench: Workbench) -> Pair:
    """CLIP of a transformers CLIPModel beside open_clip's CLIP of the same shape and weights, with open_clip's loss."""
    objective, batch, pixels = _clip(bench)
    model = _open_clip_model(bench, objective.model, batch["text_ids"].shape[1])
    criterion = open_clip.loss.ClipLoss()

    def theirs() -> Tensor:
        pictures, texts, scale = model(pixels, batch["text_ids"])
        return criterion(pictures, texts, scale)

    return Pair(
        name="CLIP step",
        peer="open_clip",
        ours=bench.ours(objective, batch),
        theirs=bench.theirs([model], theirs),
        tolerance=bench.tolerance,
        lever="closed-form loss",
    )


def clip_pair(bench: Workbench) -> Pair:
    """CLIP of a CLIPModel beside the same CLIPModel with its own loss."""
    return _beside_transformers(bench, "CLIP step", *_clip(bench), lever="closed-form loss")


def siglip_pair(bench: Workbench) -> Pair:
    """SigLIP of a SiglipModel beside the same SiglipModel with its own loss."""
    settings = siglip.Settings(start_temperature=10.0, start_bias=-10.0)
    objective = siglip.build(settings, _start(bench, "siglip", _tokenizer(bench)))
    batch = bench.batch(objective, _captions(bench.sizes.batch))
    pixels = objective.tower.normalise(batch["views"])
    return _beside_transformers(bench, "SigLIP step", objective, batch, pixels, lever="loss in blocks")


def _beside_transformers(
    bench: Workbench, name: str, objective: PictureTextObjective, batch: dict[str, Tensor], pixels: Tensor, lever: str
) -> Pair:
    """Our step beside that of a copy of the same model with transformers' loss."""
    model = copy.deepcopy(objective.model)

    def theirs() -> Tensor:
        return model(input_ids=batch["text_ids"], pixel_values=pixels, return_loss=True).loss

    return Pair(
        name=name,
        peer="transformers",
        ours=bench.ours(objective, batch),
        theirs=bench.theirs([model], theirs),
        tolerance=bench.tolerance,
        lever=lever,
    )


def _clip(bench: Workbench) -> tuple[clip.ClipObjective, dict[str, Tensor], Tensor]:
    """Our objective on a new CLIPModel, its batch, and the normalised pixels."""
    tokenizer = clip_tokenizer(_tokenizer(bench), bench.sizes.text_length)
    objective = clip.build(clip.Settings(), _start(bench, "clip", tokenizer))
    batch = bench.batch(objective, _captions(bench.sizes.batch))
    return objective, batch, objective.tower.normalise(batch["views"])


def _start(bench: Workbench, family: Literal["clip", "siglip"], tokenizer: PreTrainedTokenizerFast) -> Start:
    """A new model with a text half of the tower's size."""
    sizes = bench.sizes
    text = TextShape(sizes.width, sizes.layers, sizes.heads, sizes.text_length, 4 * sizes.width)
    torch.manual_seed(0)
    model = new_pair(bench.shape(family), text, tokenizer).to(bench.device)
    processor = new_image_processor(family, sizes.side)
    return Start(side=sizes.side, model=model, image_processor=processor, tokenizer=tokenizer)


def _open_clip_model(bench: Workbench, ours: CLIPModel, text_length: int) -> CLIP:
    """open_clip's model with the weights of ours. It always reads texts of its full length, so that is the batch's."""
    sizes, text = bench.sizes, ours.config.text_config
    shape: dict[str, Any] = {"layers": sizes.layers, "width": sizes.width}
    head_width = sizes.width // sizes.heads
    vision = CLIPVisionCfg(**shape, head_width=head_width, patch_size=sizes.patch, image_size=sizes.side)
    model = CLIP(
        embed_dim=sizes.width,
        vision_cfg=vision,
        text_cfg=CLIPTextCfg(**shape, heads=sizes.heads, context_length=text_length, vocab_size=text.vocab_size),
    )
    weights = for_open_clip(ours.state_dict())
    weights["positional_embedding"] = weights["positional_embedding"][:text_length]
    model.load_state_dict(weights, strict=True)
    return model.to(bench.device)


def _captions(count: int) -> list[str]:
    """Different captions of generated scenes: equal ones would be true pairs, which the peers do not know."""
    captions: dict[str, None] = {}
    seed = 0
    while len(captions) < count:
        captions.update(dict.fromkeys(words_of_scene(seed)[0]))
        seed += 1
    return list(captions)[:count]


def _tokenizer(bench: Workbench) -> PreTrainedTokenizerFast:
    """A small tokenizer trained on captions, filled up with words that no text has: a large vocabulary costs a step."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.model"
        train_sentencepiece(_captions(400), TOKENIZER_WORDS, file)
        tokenizer = fast_tokenizer(file, max_length=1024)
    tokenizer.add_tokens([f"<filler {number}>" for number in range(bench.sizes.vocabulary - len(tokenizer))])
    return tokenizer
