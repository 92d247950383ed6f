"""Tiny random models in exactly the published layout, for tests that need a model and not its wits."""

from pathlib import Path
from typing import Literal

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from assistant.checkpoint import save_llava
from assistant.fusion import calibrate_projector, join
from assistant.towers import ViTShape, new_tower
from training.data.scenes import make_scene
from training.tokenizer import fast_tokenizer, train_sentencepiece

TowerFamily = Literal["clip", "siglip", "dinov2"]


def make_tiny_tokenizer(folder: Path, vocabulary: int = 640) -> PreTrainedTokenizerFast:
    """A tokenizer of `vocabulary` words trained on the words of generated scenes."""
    scenes = [make_scene(seed) for seed in range(200)]
    texts = [text for scene in scenes for text in (*scene.captions, *(q.question for q in scene.questions))]
    train_sentencepiece(texts, vocabulary, folder / "tokenizer.model")
    return fast_tokenizer(folder / "tokenizer.model", max_length=1024)


def make_tiny_llava(folder: Path, seed: int = 0) -> Path:
    """A LLaVA with a SigLIP tower (100 patches), an MLP projector and a Llama, random weights, under a megabyte.

    Its greedy answers go on until they are stopped, on every kind of processor.
    """
    torch.manual_seed(seed)
    tokenizer = make_tiny_tokenizer(folder)
    tower = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=160,
            patch_size=16,
        )
    )
    language_model = make_tiny_language_model(tokenizer)
    with torch.no_grad():  # the head is tied to the embeddings: 0 is never the largest of 640 random logits
        language_model.get_input_embeddings().weight[tokenizer.eos_token_id] = 0
    save_llava(*join(tower, language_model, tokenizer), folder)
    return folder


def make_tiny_language_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of two layers with random weights, for `tokenizer`."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            initializer_range=0.2,  # wide enough that greedy answers vary
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_tiny_joined(family: TowerFamily, folder: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA with a tower of `family` (100 patches), random weights, and answers that hang on the picture.

    It is saved in `folder` as it is returned.
    """
    torch.manual_seed(0)
    tokenizer = make_tiny_tokenizer(folder)
    tower = new_tower(ViTShape(family=family, width=64, layers=3, heads=2, patch=16, image_side=160))
    language_model = make_tiny_language_model(tokenizer)
    model, processor = join(tower.model, language_model, tokenizer, tower.image_processor)
    calibrate_projector(model, torch.randn(4, 3, 160, 160))
    save_llava(model, processor, folder)
    return model.eval(), processor
