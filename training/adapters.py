"""Put LoRA matrices beside the language model's own, by full paths, and export what they learned."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from pydantic import Field
from torch import Tensor, nn

from assistant.adapter_files import ADAPTER, BASE, LANGUAGE_LAYERS, merge_adapter, save_adapter
from assistant.checkpoint import load_llava, save_llava
from assistant.models import ModelError
from assistant.projectors import Llava
from training.strict import Strict


class LoraSettings(Strict):
    """The size of an adapter, and what it stands on."""

    rank: int = Field(16, ge=1, le=512, description="columns of the two small matrices; vLLM serves up to 512")
    alpha: int = Field(32, ge=1, description="the product of both is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        description="linear layers of the language model, by their own names",
    )


@dataclass(frozen=True)
class Adapter:
    """What was injected: peft's configuration, the full paths of the modules it stands on, and whose they are."""

    config: LoraConfig
    modules: tuple[str, ...]
    base: Path  # the folder of the model it stands on
    base_name: str  # what people call that model

    def parameters(self) -> set[str]:
        """Names, in the model, of exactly the adapter's own weights."""
        return {f"{module}.lora_{half}.default.weight" for module in self.modules for half in "AB"}

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The adapter's own weights by name, on the CPU."""
        own = dict(model.named_parameters())
        return {name: own[name].detach().cpu() for name in sorted(self.parameters())}

    def told(self) -> str:
        """What it hit, a line for each full path; the layers of a path are counted."""
        layers: dict[str, list[int]] = {}
        for module in self.modules:
            number, _, rest = module.removeprefix(LANGUAGE_LAYERS).partition(".")
            layers.setdefault(rest, []).append(int(number))
        paths = [f"{LANGUAGE_LAYERS}{_ranges(numbers)}.{rest}" for rest, numbers in layers.items()]
        return "\n".join([f"rank {self.config.r} on {len(self.modules)} modules:", *paths])


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2] -> "{0..2}", as a shell would write it."""
    if list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return f"{{{','.join(map(str, numbers))}}}"


def add_lora(model: Llava, settings: LoraSettings, base: Path, base_name: str) -> Adapter:
    """Put LoRA (Hu et al. 2021) beside each linear layer of the language model that `settings` names, in place.

    It touches the language model alone: vLLM serves an adapter on tower or projector wrongly or not at all, so those
    are trained whole and baked into the base. No bias, no DoRA: vLLM refuses them.
    Raises ModelError when a name hits nothing.
    """
    adapter = planned_lora(model, settings, base, base_name)
    inject_adapter_in_model(adapter.config, model)
    return adapter


def planned_lora(model: Llava, settings: LoraSettings, base: Path, base_name: str) -> Adapter:
    """The adapter that `add_lora` would inject. Raises ModelError when a name hits nothing."""
    modules = lora_modules(model, settings.targets)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(modules),
        bias="none",
        task_type="CAUSAL_LM",
    )
    return Adapter(config, modules, base, base_name)


def export_adapted(model: Llava, adapter: Adapter, baked: set[str], folder: Path) -> None:
    """Write three things: base and adapter merged into `folder`, the adapter beside, and a new base where need be.

    `baked` are the names of the other parameters of `model` that trained. An adapter cannot carry them to vLLM, so a
    copy of the base gets them, and it is the base that the adapter is for.
    """
    base, name = adapter.base, adapter.base_name
    if baked:
        base, name = folder / BASE, str((folder / BASE).absolute())
        _bake(model, adapter.base, baked, base)
    held_in = "nf4" if getattr(model, "is_loaded_in_4bit", False) else None
    save_adapter(adapter.config, adapter.weights(model), base, name, folder / ADAPTER, held_in)
    merge_adapter(folder / ADAPTER, folder, base)


def _bake(model: Llava, original: Path, names: set[str], folder: Path) -> None:
    """The model of `original` as on disk, unquantised, with the parameters called `names` as `model` has them."""
    base, processor = load_llava(original)
    trained, target = dict(model.named_parameters()), dict(base.named_parameters())
    with torch.no_grad():
        for name in names:
            target[name].copy_(trained[name].to(target[name].device))
    save_llava(base, processor, folder)


def lora_modules(model: Llava, targets: Sequence[str]) -> tuple[str, ...]:
    """Full paths of the language model's linear layers whose own names are among `targets`, in the model's order.

    Raises ModelError naming a target that hits nothing, and what there is.
    """
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(LANGUAGE_LAYERS)
    ]
    own = {name.rpartition(".")[2] for name in linear}
    missing = [target for target in targets if target not in own]
    if missing:
        raise ModelError(
            f"lora.targets: {', '.join(missing)} is no layer of this language model; there are {', '.join(sorted(own))}"
        )
    return tuple(name for name in linear if name.rpartition(".")[2] in targets)
