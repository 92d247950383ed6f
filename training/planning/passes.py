"""What one sample passes through: stacks of transformer layers or convolutions, how often, and with how many tokens."""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.models.dinov2.modeling_dinov2 import Dinov2LayerScale

from assistant.tiles import most_views
from assistant.tower_families import ResNet, family_of
from assistant.tower_shapes import output_side
from assistant.towers import Tower
from training.objective import Objective
from training.objectives.instruct import InstructObjective
from training.objectives.language import LanguageObjective
from training.objectives.mae import MaeObjective
from training.objectives.moco import MocoObjective
from training.objectives.simclr import SimclrObjective
from training.picture_text import PictureTextObjective
from training.self_distillation import LARGE_CROPS, SelfDistillation


@dataclass(frozen=True)
class Layers:
    """Equal transformer layers, through which `rows` rows of `tokens` tokens of each sample go."""

    name: str
    count: int
    width: int
    feed_forward: int
    heads: int
    keys: int  # width of keys, and of values: less than `width` where heads share them
    tokens: int
    rows: int = 1
    trains: bool = True
    gated: bool = False  # Llama's layers: RMSNorm, rotated positions, three maps in the MLP
    scaled: bool = False  # LayerScale
    eager: bool = False  # attention that keeps its (T, T) matrices
    pixels: int = 0  # numbers of a picture that enter a patch embedding that trains, for each row
    pooled: bool = False  # by SigLIP's attention head, which keeps keys and values of all tokens

    def weights(self) -> int:
        """Of one layer, those that a token is multiplied with."""
        maps = 3 if self.gated else 2
        return 2 * self.width * (self.width + self.keys) + maps * self.width * self.feed_forward

    def flops(self) -> float:
        """Of one sample going forward: a multiply-add is two. Attention counts all pairs of tokens."""
        pairs = 4 * self.tokens * self.width
        embedding = 2 * self.pixels * self.width
        return self.rows * (self.count * self.tokens * (2 * self.weights() + pairs) + embedding)


@dataclass(frozen=True)
class Convolutions:
    """The convolutions of a ResNet, through which `rows` pictures of each sample go."""

    name: str
    outputs: int  # numbers that all convolutions give for one picture
    multiplied: int  # multiply-adds of all convolutions for one picture
    rows: int
    pixels: int
    trains: bool = True

    def flops(self) -> float:
        """Of one sample going forward: a multiply-add is two."""
        return 2 * self.rows * self.multiplied


Passes = Layers | Convolutions


def passes_of(objective: Objective, tokens: int | None = None) -> list[Passes]:
    """All that a sample of `objective` passes through; `tokens` of text in a sample where the objective has no say."""
    match objective:
        case PictureTextObjective():
            text = _stack("text half", objective.model.text_model.encoder.layers, objective.model.text_model.config)
            return [_tower("tower", objective.tower, objective.side), replace(text, tokens=objective.text_length)]
        case MaeObjective():
            seen = objective.seen + family_of(objective.tower.model).leading(objective.tower.model)
            tower = _tower("tower", objective.tower, objective.side)
            decoder = _stack("decoder", objective.decoder.layers, objective.decoder.config)
            assert isinstance(tower, Layers)
            return [replace(tower, tokens=seen), replace(decoder, tokens=objective.patches + 1)]
        case SelfDistillation():
            return list(_crops(objective))
        case MocoObjective():
            tower = _tower("tower", objective.tower, objective.side, 2)
            if objective.tower.has_patch_tokens and objective.settings.freeze_patch_embedding:
                tower = replace(tower, pixels=0)
            return [tower, _tower("teacher", objective.teacher_tower.model, objective.side, 2, False)]
        case SimclrObjective():
            return [_tower("tower", objective.tower, objective.side, 2)]
        case LanguageObjective():
            return [_decoder(objective.model, tokens or objective.model.config.max_position_embeddings, True)]
        case InstructObjective():
            return list(_seeing_and_reading(objective, tokens or objective.longest))
    raise TypeError(f"{type(objective).__name__} is not planned yet: say in passes_of what its samples pass through")


def _crops(objective: SelfDistillation) -> Iterator[Passes]:
    settings = objective.settings
    yield _tower("tower, large crops", objective.tower, objective.side, LARGE_CROPS)
    if settings.small_count:
        yield _tower("tower, small crops", objective.tower, settings.small_side, settings.small_count)
    yield _tower("teacher", objective.teacher_tower.model, objective.side, LARGE_CROPS, False)


def _seeing_and_reading(objective: InstructObjective, tokens: int) -> Iterator[Passes]:
    """One picture, and a lesson of `tokens` tokens. What stands before a part that trains is passed back through."""
    tower = objective.model.model.vision_tower
    side = output_side(objective.processor.image_processor)
    patches = (side // tower.config.patch_size) ** 2
    views = most_views(objective.processor)
    yield _transformer("tower", tower, patches, 3 * side**2, views, trains="tower" in objective.trains)
    yield _decoder(objective.model.model.language_model, tokens, True)


def _decoder(model: nn.Module, tokens: int, trains: bool) -> Layers:
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    return replace(_stack("language model", layers, model.config, trains), tokens=tokens)


def _tower(name: str, tower: Tower, side: int, rows: int = 1, trains: bool = True) -> Passes:
    family = family_of(tower.model)
    if isinstance(family, ResNet):
        return _convolutions(name, tower.model, side, rows, trains)
    height, width = tower.grid(side, side)
    return _transformer(name, tower.model, height * width, 3 * side**2, rows, trains)


def _transformer(name: str, model: nn.Module, patches: int, pixels: int, rows: int = 1, trains: bool = True) -> Layers:
    family = family_of(model)
    stack = _stack(name, family.layers(model), model.config, trains)
    pooled = bool(getattr(model, "use_head", False))
    return replace(stack, tokens=patches + family.leading(model), rows=rows, pixels=pixels, pooled=pooled)


def _stack(name: str, stack: Iterable[nn.Module], config: object, trains: bool = True) -> Layers:
    """The shape of the layers in `stack`, read from the first one's own maps."""
    layers = list(stack)
    maps = [module for module in layers[0].modules() if isinstance(module, nn.Linear)]
    width = int(config.hidden_size)  # type: ignore[attr-defined]
    heads = int(config.num_attention_heads)  # type: ignore[attr-defined]
    widest = max(max(one.in_features, one.out_features) for one in maps)
    own_keys = getattr(config, "num_key_value_heads", None) or heads
    return Layers(
        name,
        len(layers),
        width,
        widest,
        heads,
        width // heads * own_keys,
        tokens=0,
        trains=trains,
        gated=not _has(layers[0], nn.LayerNorm),
        scaled=_has(layers[0], Dinov2LayerScale),
        eager=config._attn_implementation == "eager",  # type: ignore[attr-defined]
    )


def _has(layer: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(module, kind) for module in layer.modules())


def _convolutions(name: str, model: nn.Module, side: int, rows: int, trains: bool) -> Convolutions:
    """Counted as one picture passes a copy of `model` that has shapes and no weights."""
    outputs, multiplied = 0, 0

    def count(module: nn.Module, inputs: object, output: Tensor) -> None:
        nonlocal outputs, multiplied
        assert isinstance(module, nn.Conv2d)
        outputs += output.numel()
        multiplied += output.numel() * module.weight[0].numel()

    bare = copy.deepcopy(model).to("meta")
    for module in bare.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        bare.eval()(torch.empty(1, 3, side, side, device="meta"))
    return Convolutions(name, outputs, multiplied, rows, 3 * side**2, trains)


def training_flops(passes: Iterable[Passes]) -> float:
    """FLOPs of training on one sample: what trains costs three times its forward (Kaplan et al. 2020, section 2.1).

    Embeddings, heads and losses are left out: they are some percent of a tower of usual size.
    """
    return sum((3 if one.trains else 1) * one.flops() for one in passes)
