"""Build one optimiser step of ours and of a peer in one way, so that only what is compared differs.

Equal on both sides: weights at the start, views, masks, texts, sizes of tower and heads, batch, precision, threads, and
the loop (`Step`): forward, backward, gradients clipped, AdamW with the trainer's settings. Ours is built, collated and
optimised as training does it. The peer's pixels are normalised beforehand, as its own data loaders do it; ours are
normalised within the step.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightly.models.modules import MaskedVisionTransformerTIMM
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer

from assistant.towers import Tower, ViTShape, new_tower
from scripts.benchmarks.peer_weights import for_timm
from training.arguments import training_arguments
from training.config import Schedule
from training.data.pictures import Picture
from training.objective import Objective, Start, total_loss
from training.trainer import ObjectiveTrainer

Family = Literal["clip", "siglip", "dinov2", "vit"]
STEPS = 1_000_000  # of the run that a step is taken from: schedules stand nearly still
TOLERANCE = 1e-3  # between the first losses: other kernels, another order of sums
BF16_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Sizes:
    """What is trained on what; the defaults are ViT-S/16 and the objectives' own heads."""

    batch: int = 16
    side: int = 224
    small_side: int = 96
    small_crops: int = 8
    width: int = 384
    layers: int = 12
    heads: int = 6
    patch: int = 16
    prototypes: int = 65_536
    head_hidden: int = 2048
    bottleneck: int = 256
    vocabulary: int = 32_000
    text_length: int = 64
    decoder: tuple[int, int, int] = (512, 8, 16)  # width, layers and heads of MAE's decoder as it was published


TINY = Sizes(
    batch=4,
    side=32,
    small_side=16,
    small_crops=2,
    width=32,
    layers=2,
    heads=2,
    patch=8,
    prototypes=64,
    head_hidden=48,
    bottleneck=16,
    vocabulary=100,
    text_length=8,
    decoder=(32, 2, 2),
)


class Step:
    """One optimiser step, a call each: the loop that both sides share."""

    def __init__(
        self,
        optimiser: torch.optim.Optimizer,
        forward: Callable[[], tuple[Tensor, Tensor]],
        autocast: AbstractContextManager[Any],
        before: Callable[[], None] = lambda: None,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """`forward` gives the loss, and the value that has to be equal on both sides (mostly the loss again)."""
        self.optimiser, self.forward, self.autocast = optimiser, forward, autocast
        self.before, self.after = before, after
        self.parameters = [p for group in optimiser.param_groups for p in group["params"]]

    def __call__(self) -> Tensor:
        self.before()
        with self.autocast:
            loss, shared = self.forward()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.after()
        return shared.detach()


class Workbench:
    """Builds both sides of a step in one way: the same sizes, device, precision and optimiser settings."""

    def __init__(self, sizes: Sizes, bf16: bool, device: torch.device, folder: Path) -> None:
        """`folder` is named to the trainer, which writes nothing into it here."""
        self.sizes, self.bf16, self.device = sizes, bf16, device
        self.schedule = Schedule(steps=STEPS, batch_size=sizes.batch, learning_rate=1e-4, bf16=bf16)
        self.folder = folder
        self.tolerance = BF16_TOLERANCE if bf16 else TOLERANCE

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 where it is asked for."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.bf16 else nullcontext()

    def shape(self, family: Family) -> ViTShape:
        """A tower of `family`; without stochastic depth, whose chance the two sides would not share."""
        s = self.sizes
        return ViTShape(family=family, width=s.width, layers=s.layers, heads=s.heads, patch=s.patch, image_side=s.side)

    def start(self, family: Family) -> Start:
        """A new tower of `family` to train by itself."""
        torch.manual_seed(0)
        return Start(side=self.sizes.side, tower=new_tower(self.shape(family)).to(self.device))

    def batch(self, objective: Objective, texts: Sequence[str] = ()) -> dict[str, Tensor]:
        """What the objective's own `sample` and `collate` make of pictures of noise, each with its own text if any."""
        generator = np.random.default_rng(0)
        side = self.sizes.side + 32
        samples = []
        for number in range(self.sizes.batch):
            pixels = torch.from_numpy(generator.integers(0, 256, (3, side, side), dtype=np.uint8))
            picture = Picture(f"noise {number}", pixels, tuple(texts[number : number + 1]))
            samples.append(objective.sample(picture, generator))
        return {name: value.to(self.device) for name, value in objective.collate(samples).items()}

    def ours(
        self,
        objective: Objective,
        batch: Mapping[str, Any],
        shared: Callable[[Mapping[str, Tensor]], Tensor] = total_loss,
    ) -> Step:
        """Our step; `shared` makes what both sides have to agree on of the objective's values."""
        trainer = ObjectiveTrainer(objective, self.schedule, self.folder, _Nothing(), _Nothing())
        optimiser = trainer.create_optimizer()
        objective.train()

        def forward() -> tuple[Tensor, Tensor]:
            values = objective(**batch)
            return total_loss(values), shared(values)

        return Step(
            optimiser,
            forward,
            self.autocast(),
            before=lambda: objective.begin_step(0, STEPS),
            after=lambda: objective.after_step(0, STEPS),
        )

    def theirs(
        self, trained: Iterable[nn.Module], forward: Callable[[], Tensor | tuple[Tensor, Tensor]], after: Any = None
    ) -> Step:
        """The peer's step: the same optimiser class and settings for what of `trained` moves."""
        arguments = training_arguments(self.schedule, self.folder, Objective())
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
        moving = [p for module in trained for p in module.train().parameters() if p.requires_grad]
        optimiser = kind(moving, weight_decay=arguments.weight_decay, **settings)

        def loss_and_shared() -> tuple[Tensor, Tensor]:
            result = forward()
            return result if isinstance(result, tuple) else (result, result)

        return Step(optimiser, loss_and_shared, self.autocast(), after=after or (lambda: None))

    def timm_backbone(self, tower: Tower) -> MaskedVisionTransformerTIMM:
        """lightly's backbone, a timm ViT, with the weights of `tower` (vit or dinov2)."""
        s = self.sizes
        weights = for_timm(tower.model.state_dict())
        scaled = any(name.endswith(".ls1.gamma") for name in weights)
        vit = VisionTransformer(
            img_size=s.side,
            patch_size=s.patch,
            embed_dim=s.width,
            depth=s.layers,
            num_heads=s.heads,
            num_classes=0,
            dynamic_img_size=True,
            init_values=1.0 if scaled else None,
            norm_layer=partial(nn.LayerNorm, eps=tower.model.config.layer_norm_eps),
        )
        vit.load_state_dict(weights, strict=True)
        backbone = MaskedVisionTransformerTIMM(
            vit, weight_initialization="skip", antialias=False, pos_embed_initialization="skip"
        )
        own = tower.own_mask_token()
        if own is not None:
            backbone.mask_token.data.copy_(own[None])
        return backbone.to(self.device)


class _Nothing(Dataset[Any]):
    """The trainer asks for data sets; here batches are made beforehand."""

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> Any:
        raise IndexError(index)
