"""Say what a model takes of each GPU when vLLM serves it, how much it serves there at most, and by which flags."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from training.config import RecipeError
from training.planning.costs_report import gigabytes
from training.planning.launching import bytes_in, machines

USED_BY_VLLM = 0.92  # of a GPU's memory, vLLM's --gpu-memory-utilization where nobody says it
HALF = 2  # bytes of a number in bf16
COLUMNS = ("GPUs an engine", "engines", "weights a GPU", "requests at once", "first token", "one answer", "all")
WORDS = 320  # tokens of a question and its answer


@dataclass(frozen=True)
class Served:
    """What serving depends on of a LLaVA-shaped model. Weights are counted, not bytes."""

    name: str
    weights: int
    read_weights: int  # those that writing a token reads: the language model's, less the table of input words
    layers: int
    heads: int
    cached_heads: int  # heads of keys and values
    head_width: int
    picture_tokens: int

    @property
    def cache_bytes(self) -> int:
        """Of one token: a key and a value for each layer and head."""
        return 2 * self.layers * self.cached_heads * self.head_width * HALF


@dataclass(frozen=True)
class Gpu:
    """Bytes of memory, bytes that it reads a second, and FLOPs a second in bf16."""

    memory: float
    bandwidth: float
    flops: float

    @property
    def most_at_once(self) -> int:
        """Requests that vLLM 0.32 runs at once on such a GPU where nobody says --max-num-seqs."""
        return 1024 if self.memory >= 70 * 2**30 else 256


@dataclass(frozen=True)
class Split:
    """One engine on `gpus` GPUs by tensor parallelism, and what it does at most with requests of `tokens` each.

    Bounds, as of a roofline (Williams et al. 2009): each step reads the weights once and the cache of every answer,
    and multiplies with two FLOPs a weight and token; the slower of the two is the step. What GPUs of an engine send one
    another, what vLLM keeps for activations, and its own time between two steps are not in it.
    """

    model: Served
    gpu: Gpu
    gpus: int
    tokens: int

    @property
    def weights_bytes(self) -> float:
        """On each GPU."""
        return self.model.weights * HALF / self.gpus

    @property
    def cache_bytes(self) -> float:
        """Of a token on each GPU: heads are dealt out, and held twice where there are fewer than GPUs."""
        return self.model.cache_bytes / min(self.gpus, self.model.cached_heads)

    @property
    def room(self) -> int:
        """Requests at once: what the cache holds, or vLLM takes; 0 where not even the weights fit."""
        left = USED_BY_VLLM * self.gpu.memory - self.weights_bytes
        return min(self.gpu.most_at_once, max(0, int(left / (self.cache_bytes * self.tokens))))

    def first_token_seconds(self) -> float:
        """Until a request's picture and question are read, by arithmetic alone."""
        return 2 * self.model.read_weights * self.tokens / (self.gpus * self.gpu.flops)

    def tokens_a_second(self, answers: int) -> float:
        """Written by the engine in all, with so many answers at once."""
        read = self.model.read_weights * HALF / self.gpus + answers * self.tokens * self.cache_bytes
        computed = 2 * self.model.read_weights * answers / self.gpus
        return answers / max(read / self.gpu.bandwidth, computed / self.gpu.flops)


def served(model: str) -> Served:
    """What the configuration of `model` says: a folder, or a name of the hub. No weights are read.

    Raises RecipeError where there is no configuration of a LLaVA-shaped model.
    """
    try:
        config = AutoConfig.from_pretrained(model)
        text = config.text_config
        with torch.device("meta"):
            whole, language = AutoModelForImageTextToText.from_config(config), AutoModelForCausalLM.from_config(text)
    except (OSError, ValueError, AttributeError) as error:
        raise RecipeError(f"--serve {model}: there is no configuration of a LLaVA-shaped model ({error})") from error
    table = 0 if text.tie_word_embeddings else language.get_input_embeddings().weight.numel()
    return Served(
        name=Path(model).name,
        weights=sum(weight.numel() for weight in whole.parameters()),
        read_weights=sum(weight.numel() for weight in language.parameters()) - table,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        cached_heads=text.num_key_value_heads,
        head_width=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        picture_tokens=config.image_seq_length,
    )


def splits(model: Served, gpu: Gpu, devices: int, per_machine: int, tokens: int) -> Iterator[Split]:
    """One GPU an engine, two, four, and so on up to a machine's, where heads and devices divide by it."""
    gpus = 1
    while gpus <= min(devices, per_machine):
        if devices % gpus == 0 and model.heads % gpus == 0:
            yield Split(model, gpu, gpus, tokens)
        gpus *= 2


def flags(split: Split, devices: int, per_machine: int) -> str:
    """What vLLM is told to lay it out so; over several machines only the first one's share is started there."""
    engines, here = devices // split.gpus, min(devices, per_machine) // split.gpus
    said = [f"--tensor-parallel-size {split.gpus}"] * (split.gpus > 1)
    said += [f"--data-parallel-size {engines}"] * (engines > 1)
    said += [f"--data-parallel-size-local {here} --data-parallel-address $FIRST"] * (engines > here)
    return " ".join(said) or "(none)"


def report_serving(
    model: str,
    devices: int,
    per_machine: int,
    memory: str,
    bandwidth: str,
    teraflops: float,
    tokens: int | None,
    console: Console,
) -> list[Split]:
    """Print a line for each way to split `devices` into engines, and return them. Raises RecipeError."""
    machines(devices, per_machine)
    found = served(model)
    gpu = Gpu(bytes_in(memory, "--memory"), bytes_in(bandwidth, "--bandwidth"), teraflops * 1e12)
    tokens = tokens or found.picture_tokens + WORDS
    console.print(
        f"{found.name}: {found.weights / 1e9:.3g} billion weights, {gigabytes(found.weights * HALF)} in bf16; "
        f"{gigabytes(found.cache_bytes)} of cache a token; a picture is {found.picture_tokens} tokens; "
        f"{tokens:,} tokens a request; {devices} GPUs, each {memory}, {bandwidth}, {teraflops:g} TFLOP/s",
        soft_wrap=True,
    )
    table = Table(box=box.MARKDOWN)
    for column in COLUMNS:
        table.add_column(column, justify="right")
    table.add_column("flags for vLLM")
    rows = list(splits(found, gpu, devices, per_machine, tokens))
    for split in rows:
        engines = devices // split.gpus
        fits = split.room > 0
        table.add_row(
            str(split.gpus),
            str(engines),
            gigabytes(split.weights_bytes),
            f"{engines * split.room:,}" if fits else "does not fit",
            f"{1e3 * split.first_token_seconds():.3g} ms" if fits else "-",
            f"{split.tokens_a_second(1):,.0f}/s" if fits else "-",
            f"{engines * split.tokens_a_second(split.room):,.0f}/s" if fits else "-",
            flags(split, devices, per_machine),
        )
    console.print(table, soft_wrap=True)
    return rows
