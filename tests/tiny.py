"""Tiny random models in exactly the published layout, for tests that need a model and not its wits."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, SiglipVisionConfig, SiglipVisionModel

from assistant.checkpoint import save_llava
from assistant.fusion import join
from training.data.scenes import make_scene
from training.tokenizer import fast_tokenizer, train_sentencepiece


def make_tiny_tokenizer(folder: Path, vocabulary: int = 640) -> PreTrainedTokenizerFast:
    """A tokenizer of `vocabulary` words trained on the words of generated scenes."""
    scenes = [make_scene(seed) for seed in range(200)]
    texts = [text for scene in scenes for text in (*scene.captions, *(q.question for q in scene.questions))]
    train_sentencepiece(texts, vocabulary, folder / "tokenizer.model")
    return fast_tokenizer(folder / "tokenizer.model", max_length=1024)


def make_tiny_llava(folder: Path, seed: int = 0) -> Path:
    """A LLaVA with a SigLIP tower (100 patches), an MLP projector and a Llama, random weights, under a megabyte."""
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
    language_model = LlamaForCausalLM(
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
    save_llava(*join(tower, language_model, tokenizer), folder)
    return folder
