"""A LLaVA, lessons, and three trainers of one adapter: ours, transformers' and TRL's, on the same samples in order."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaProcessor,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from assistant.checkpoint import load_llava, save_llava
from assistant.fusion import join
from assistant.models import JOEY
from assistant.towers import ViTShape, new_tower
from scripts.benchmarks.measuring import Pair
from training.adapters import LoraSettings, lora_modules
from training.config import InstructStage
from training.data.samples import Mixture
from training.stages import Workshop, prepared_lessons
from training.supervised_loss import supervised_cross_entropy
from training.teaching import Wish, teaching_recipe
from training.trainer import ObjectiveTrainer

RANK = 16
IGNORED = -100
# Tokens of the answers of a batch of eight: the first six lessons have a picture, the last two are text alone. With
# 196 tokens a picture some 36 % of a padded batch is padding, and some 22 % of the rest is supervised.
ANSWERS = (8, 15, 30, 50, 70, 130, 25, 55)
PICTURED = 6
WORDS = ("red", "green", "blue", "left", "right", "circle", "square", "a", "the", "is", "of", "two", "three", "large")


@dataclass(frozen=True)
class Sizes:
    """The model: a CLIP-shaped tower and a Llama; the defaults have 48 million weights."""

    side: int = 224
    patch: int = 16
    tower_width: int = 384
    tower_layers: int = 6
    width: int = 512
    layers: int = 6
    feed_forward: int = 1408
    vocabulary: int = 32_064


TINY = Sizes(side=32, patch=16, tower_width=32, tower_layers=2, width=32, layers=2, feed_forward=64, vocabulary=8192)


def make_model(sizes: Sizes, folder: Path) -> Path:
    """A LLaVA with random weights and Joey's tokenizer and template, saved in `folder`."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(JOEY)
    tower = new_tower(
        ViTShape("clip", sizes.tower_width, sizes.tower_layers, sizes.tower_width // 16, sizes.patch, sizes.side)
    )
    language_model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.width,
            intermediate_size=sizes.feed_forward,
            num_hidden_layers=sizes.layers,
            num_attention_heads=max(2, sizes.width // 64),
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    save_llava(*join(tower.model, language_model, tokenizer, tower.image_processor), folder)
    return folder


def write_lessons(batches: int, side: int, folder: Path) -> Path:
    """`batches` x 8 conversations of one turn, with pictures of noise, as lines of messages."""
    random, generator = Random(0), np.random.default_rng(0)
    lines = []
    for number in range(batches * len(ANSWERS)):
        place = number % len(ANSWERS)
        question: list[dict[str, Any]] = [{"type": "text", "text": _words(random, 18)}]
        if place < PICTURED:
            name = f"{number}.png"
            Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / name)
            question.insert(0, {"type": "image_url", "image_url": {"url": name}})
        answer = [{"type": "text", "text": _words(random, ANSWERS[place])}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}))
    file = folder / "lessons.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def _words(random: Random, number: int) -> str:
    return " ".join(random.choice(WORDS) for _ in range(number))


def our_trainer(model: Path, data: Path, steps: int, folder: Path, bf16: bool) -> tuple[ObjectiveTrainer, list[int]]:
    """What `kangaroo tune` trains with, and the rows of `data` in the order in which it sees them."""
    recipe = teaching_recipe(Wish(str(model), str(data), "lora", folder, steps=steps, rank=RANK))
    stage = recipe.stages[0]
    assert isinstance(stage, InstructStage)
    never = {"evaluate_every": 10 * steps, "save_every": 10 * steps, "log_every": 1, "bf16": bf16, "workers": 0}
    stage = stage.model_copy(update={"schedule": stage.schedule.model_copy(update=never)})
    objective, lessons, held_out = prepared_lessons(stage, Workshop(folder, None))
    assert isinstance(lessons, Mixture)
    source = lessons.sources[0]
    order = [int(source._chosen[index]) for index in lessons.index_of]  # type: ignore[attr-defined]
    return ObjectiveTrainer(objective, stage.schedule, folder / "ours", lessons, held_out), order


class Rows(Dataset[Any]):
    """Rows of `file` in `order`, each as messages with its picture, as transformers' documentation has them."""

    def __init__(self, file: Path, order: Sequence[int]) -> None:
        self.folder, self.order = file.parent, order
        self.rows = [json.loads(line)["messages"] for line in file.read_text().splitlines()]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> dict[str, Any]:
        """Messages with a place for the picture, and the pictures."""
        messages, images = [], []
        for message in self.rows[self.order[place]]:
            content = []
            for part in message["content"]:
                if part["type"] == "image_url":
                    images.append(Image.open(self.folder / part["image_url"]["url"]).convert("RGB"))
                    part = {"type": "image"}
                content.append(part)
            messages.append({"role": message["role"], "content": content})
        return {"messages": messages, "images": images}


class Collates:
    """What a user of transformers' Trainer writes: the template, labels for the assistant's words alone, padding."""

    def __init__(self, processor: LlavaProcessor) -> None:
        self.processor = processor

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """input_ids, attention_mask, labels (B, T) and pixel_values."""
        texts = [self.processor.apply_chat_template(row["messages"], tokenize=False) for row in rows]
        images = [image for row in rows for image in row["images"]]
        batch = self.processor(
            text=texts, images=images or None, padding=True, return_tensors="pt", add_special_tokens=False
        )
        labels = torch.full_like(batch["input_ids"], IGNORED)
        assistant = self.processor.tokenizer.convert_tokens_to_ids("<|assistant|>")
        for row, ids in enumerate(batch["input_ids"]):
            # One turn each: what the assistant says ends the row.
            start = int((ids == assistant).nonzero()[0]) + 1
            real = batch["attention_mask"][row].bool()
            labels[row, start:] = torch.where(real[start:], ids[start:], IGNORED)
        return {**batch, "labels": labels}


def adapted(model: Path, ours: nn.Module) -> tuple[nn.Module, LlavaProcessor]:
    """The model of that folder with peft's adapter on the same modules, and with the same weights in it, as ours."""
    llava, processor = load_llava(model)
    modules = lora_modules(llava, LoraSettings().targets)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(modules), task_type="CAUSAL_LM")
    wrapped = get_peft_model(llava, config)
    started = {name.removeprefix("model."): value for name, value in ours.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(started[name.removeprefix("base_model.model.")])
    return wrapped, processor


SHARED = (
    "max_steps",
    "per_device_train_batch_size",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "adam_beta2",
    "max_grad_norm",
    "bf16",
    "use_cpu",
    "logging_steps",
    "remove_unused_columns",
    "dataloader_pin_memory",
    "disable_tqdm",
    "seed",
)


def _arguments(kind: type[Any], ours: TrainingArguments, folder: Path, **more: Any) -> Any:
    said = {name: getattr(ours, name) for name in SHARED}
    return kind(output_dir=str(folder), eval_strategy="no", save_strategy="no", report_to="none", **said, **more)


class InOrder:
    """What a peer's trainer needs that would shuffle; stands before it among the bases."""

    def _get_train_sampler(self, *arguments: Any, **named: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]


class PlainTrainer(InOrder, Trainer):
    """transformers' Trainer in our order."""


class TrlTrainer(InOrder, SFTTrainer):
    """TRL's in our order."""


def transformers_trainer(ours: ObjectiveTrainer, model: Path, rows: Rows, folder: Path) -> Trainer:
    """transformers' Trainer on the same samples in the same order, padded."""
    wrapped, processor = adapted(model, ours.objective)
    arguments = _arguments(TrainingArguments, ours.args, folder / "transformers")
    return PlainTrainer(wrapped, arguments, Collates(processor), rows)


def trl_trainer(ours: ObjectiveTrainer, model: Path, rows: Rows, folder: Path) -> Trainer:
    """TRL's SFTTrainer with its own collator; it refuses to pack lessons with pictures."""
    from datasets import Dataset as Table

    wrapped, processor = adapted(model, ours.objective)
    table = Table.from_list([rows[place] for place in range(len(rows))])
    arguments = _arguments(SFTConfig, ours.args, folder / "trl", assistant_only_loss=True, max_length=None)
    return TrlTrainer(wrapped, arguments, train_dataset=table, processing_class=processor)


def losses_of(trainer: Trainer) -> list[float]:
    """The loss of each step, as the trainer logged it."""
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def head_and_loss(tokens: int, width: int, vocabulary: int, supervised: float, device: torch.device) -> Pair:
    """The language model's head and the loss, forward and backward, where that share of tokens is supervised."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(device).requires_grad_()
    head = (torch.randn(vocabulary, width, generator=generator) / width**0.5).to(device)
    targets = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
    taught = (torch.rand(tokens, generator=generator) < supervised).to(device)
    labels = torch.where(taught, targets, IGNORED)
    weights = torch.ones(int(taught.sum()), device=device)

    def ours() -> Tensor:
        hidden.grad = None
        loss = supervised_cross_entropy(hidden[taught], head, targets[taught], weights)
        loss.backward()
        return loss.detach()

    def theirs() -> Tensor:
        hidden.grad = None
        logits = (hidden @ head.T).float()
        loss = functional.cross_entropy(logits, labels, ignore_index=IGNORED)
        loss.backward()
        return loss.detach()

    return Pair(
        f"head and loss, {tokens} tokens x {vocabulary:,} words",
        "torch",
        ours,
        theirs,
        1e-4,
        "supervised tokens only, a chunk at a time",
    )
