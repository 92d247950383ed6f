"""Steps of SimCLR, MAE, DINO and DINOv2 beside lightly's (on its timm backbone) and transformers' ViTMAE."""

from collections.abc import Callable, Sequence
from typing import Any

import lightly.loss
import torch
from lightly.models.modules import DINOProjectionHead, DINOv2ProjectionHead
from lightly.models.modules.heads import ProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from scripts.benchmarks.measuring import Pair
from scripts.benchmarks.peer_weights import copy_in_order, for_vit_mae
from scripts.benchmarks.workbench import Workbench
from training.heads import PrototypeHead
from training.objectives import dino, dinov2, mae, simclr

TEACHER_MOMENTUM = 0.996


def simclr_pair(bench: Workbench) -> Pair:
    """SimCLR with the paper's head of two layers; lightly's parts get both views at once, their faster form."""
    settings = simclr.Settings(head_hidden=bench.sizes.head_hidden)
    objective = simclr.build(settings, bench.start("vit"))
    batch = bench.batch(objective)
    views = objective.tower.normalise(batch["views"].transpose(0, 1).flatten(0, 1))
    backbone, hidden = bench.timm_backbone(objective.tower), settings.head_hidden
    head = ProjectionHead(
        [
            (objective.tower.width, hidden, nn.BatchNorm1d(hidden), nn.ReLU()),
            (hidden, settings.projection, None, None),
        ]
    )
    copy_in_order(objective.head.parameters(), head.parameters())
    head.to(bench.device)
    criterion = lightly.loss.NTXentLoss(temperature=settings.temperature)
    return Pair(
        name="SimCLR step",
        peer="lightly",
        ours=bench.ours(objective, batch),
        theirs=bench.theirs([backbone, head], lambda: criterion(*head(backbone(views)).chunk(2))),
        tolerance=bench.tolerance,
        lever="closed-form loss",
    )


def mae_pair(bench: Workbench) -> Pair:
    """MAE with the decoder that was published on both sides."""
    width, layers, heads = bench.sizes.decoder
    settings = mae.Settings(decoder_width=width, decoder_layers=layers, decoder_heads=heads)
    objective = mae.build(settings, bench.start("vit"))
    batch = bench.batch(objective)
    model = _vit_mae(bench, objective)
    expected = for_vit_mae(dict(objective.named_parameters()), bench.sizes.patch)
    _load(model, expected)
    pixels, noise = _vit_mae_inputs(objective, batch)
    return Pair(
        name="MAE step, equal decoder",
        peer="transformers",
        ours=bench.ours(objective, batch),
        theirs=bench.theirs([model], lambda: model(pixel_values=pixels, noise=noise).loss),
        tolerance=bench.tolerance,
        lever="only hidden patches are predicted",
    )


def light_mae_pair(bench: Workbench) -> Pair:
    """MAE with our default decoder beside the published one; the losses differ, what the tower makes of it does not."""
    objective = mae.build(mae.Settings(), bench.start("vit"))
    batch = bench.batch(objective)
    model = _vit_mae(bench, objective)
    tower = {name: value for name, value in objective.named_parameters() if name.startswith("tower.")}
    _load(model, for_vit_mae(tower, bench.sizes.patch))
    pixels, noise = _vit_mae_inputs(objective, batch)
    ours_encoded = _Watch(objective.tower, lambda output: output.patches)
    their_encoded = _Watch(model.vit, lambda output: output.last_hidden_state[:, 1:])
    return Pair(
        name="MAE step, our decoder",
        peer="transformers",
        ours=bench.ours(objective, batch, lambda values: ours_encoded.size()),
        theirs=bench.theirs([model], lambda: (model(pixel_values=pixels, noise=noise).loss, their_encoded.size())),
        tolerance=bench.tolerance,
        lever="a decoder of 4 layers of 256 channels, not 8 of 512",
    )


class _Watch:
    """Keeps what a module gave last, to compare two sides whose losses cannot be equal."""

    def __init__(self, module: nn.Module, pick: Callable[[Any], Tensor]) -> None:
        self.output = torch.empty(0)

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            self.output = pick(output).detach()

        module.register_forward_hook(keep)

    def size(self) -> Tensor:
        """Of the mean over tokens, in whatever order; a single token is as long as the last norm makes it."""
        return self.output.float().mean(1).square().mean()


def _vit_mae(bench: Workbench, objective: mae.MaeObjective) -> ViTMAEForPreTraining:
    """transformers' model with the sizes of our tower and the published decoder's, or the tiny one's."""
    sizes, vision = bench.sizes, objective.tower.model.config
    width, layers, heads = sizes.decoder
    config = ViTMAEConfig(
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=vision.intermediate_size,
        layer_norm_eps=vision.layer_norm_eps,
        image_size=sizes.side,
        patch_size=sizes.patch,
        decoder_hidden_size=width,
        decoder_num_hidden_layers=layers,
        decoder_num_attention_heads=heads,
        decoder_intermediate_size=4 * width,
        mask_ratio=objective.settings.masked,
        norm_pix_loss=objective.settings.normalise_target,
    )
    model = ViTMAEForPreTraining(config)
    # transformers 5.19 sets the decoder's fixed positions and then overwrites them with zeros.
    model.decoder.initialize_weights(objective.patches)
    return model.to(bench.device)


def _load(model: ViTMAEForPreTraining, weights: dict[str, Tensor]) -> None:
    """Load all of a ViTMAE, or its tower. Raises ValueError when something of the tower is missing."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    wanted = [name for name in missing if not name.startswith("decoder.")] + unexpected
    if wanted:
        raise ValueError(f"our tower and transformers' ViTMAE do not fit each other: {wanted}")


def _vit_mae_inputs(objective: mae.MaeObjective, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Pixels, and the noise that makes ViTMAE show the patches that we show: the lowest are seen."""
    pixels, visible = objective.tower.normalise(batch["views"]), batch["visible"]
    noise = torch.ones(len(pixels), objective.patches, device=pixels.device)
    rising = torch.linspace(0, 0.5, visible.shape[1], device=pixels.device)
    return pixels, noise.scatter_(1, visible, rising.expand_as(visible))


def dino_pair(bench: Workbench) -> Pair:
    """DINO; lightly's documented loop sends each crop through the student by itself."""
    objective = dino.build(dino.Settings(**_crops_and_heads(bench)), bench.start("vit"))
    batch = bench.batch(objective)
    large, small = (objective.tower.normalise(batch[size].flatten(0, 1)) for size in ("large", "small"))
    crops = [*_each(large, 2), *_each(small, bench.sizes.small_crops)]
    student, teacher = bench.timm_backbone(objective.tower), _frozen(bench.timm_backbone(objective.tower))
    student_head = _lightly_head(bench, DINOProjectionHead, objective.head)
    teacher_head = _frozen(_lightly_head(bench, DINOProjectionHead, objective.head))
    criterion = lightly.loss.DINOLoss(bench.sizes.prototypes, teacher_temp=0.04, warmup_teacher_temp=0.04)
    criterion.to(bench.device)

    def forward() -> Tensor:
        with torch.no_grad():
            teacher_out = [teacher_head(teacher(crop)) for crop in crops[:2]]
        student_out = [student_head(student(crop)) for crop in crops]
        return criterion(teacher_out, student_out, teacher_temp=0.04)

    def after() -> None:
        update_momentum(student, teacher, m=TEACHER_MOMENTUM)
        update_momentum(student_head, teacher_head, m=TEACHER_MOMENTUM)

    return Pair(
        name="DINO step",
        peer="lightly",
        ours=bench.ours(objective, batch),
        theirs=bench.theirs([student, student_head], forward, after),
        tolerance=bench.tolerance,
        lever="crops of one size at once, closed-form loss, foreach averaging",
    )


def dinov2_pair(bench: Workbench) -> Pair:
    """DINOv2 as lightly's example has it: crops of one size at once, a patch head, hidden patches only.

    Ours balances the teacher with Sinkhorn-Knopp as the authors do, lightly takes a running mean off, which is less
    work. So the losses differ, and KoLeo is compared, which sees all that the student's tower does to hidden pictures.
    """
    objective = dinov2.build(dinov2.Settings(**_crops_and_heads(bench)), bench.start("dinov2"))
    batch = bench.batch(objective)
    peer = _LightlyDinoV2(bench, objective, batch)
    return Pair(
        name="DINOv2 step",
        peer="lightly",
        ours=bench.ours(objective, batch, lambda values: values["koleo_loss"]),
        theirs=bench.theirs([peer.student, peer.head, peer.patch_head], peer.forward, peer.after),
        tolerance=bench.tolerance,
        lever="closed-form losses, foreach averaging; Sinkhorn-Knopp is extra work",
    )


class _LightlyDinoV2:
    """DINOv2 of lightly's modules and losses, in the order of lightly's own example."""

    def __init__(self, bench: Workbench, objective: dinov2.DinoV2Objective, batch: dict[str, Tensor]) -> None:
        normalise = objective.tower.normalise
        self.large = normalise(batch["large"].transpose(0, 1).flatten(0, 1))
        self.small = normalise(batch["small"].transpose(0, 1).flatten(0, 1))
        self.crops = 2 + bench.sizes.small_crops
        hidden = batch["hidden"].transpose(0, 1).flatten(0, 1)
        self.block_mask = hidden.unflatten(1, objective.grid)
        self.mask = torch.cat([torch.zeros_like(hidden[:, :1]), hidden], dim=1)  # the class token is never hidden
        self.student, teacher = (bench.timm_backbone(objective.tower) for _ in range(2))
        self.head, head = (_lightly_head(bench, DINOv2ProjectionHead, objective.head) for _ in range(2))
        self.patch_head, patches = (_lightly_head(bench, DINOv2ProjectionHead, objective.patch_head) for _ in range(2))
        self.teacher, self.teacher_head, self.teacher_patch_head = _frozen(teacher), _frozen(head), _frozen(patches)
        self.dino = lightly.loss.DINOLoss(bench.sizes.prototypes).to(bench.device)
        self.ibot = lightly.loss.IBOTPatchLoss(bench.sizes.prototypes).to(bench.device)
        self.koleo = lightly.loss.KoLeoLoss()

    def forward(self) -> tuple[Tensor, Tensor]:
        """The sum of the three losses, and KoLeo's."""
        with torch.no_grad():
            features = self.teacher.encode(self.large)
            teacher_out = self.teacher_head(features[:, 0])
            teacher_patches = self.teacher_patch_head(features[self.mask])
        features = self.student.encode(self.large, mask=self.mask)
        patches = self.patch_head(features[self.mask])
        scores = torch.cat([self.head(features[:, 0]), self.head(self.student.encode(self.small)[:, 0])])
        dino_loss = self.dino(teacher_out.chunk(2), scores.chunk(self.crops), teacher_temp=0.04)
        ibot_loss = self.ibot(teacher_patches, patches, self.block_mask, teacher_temp=0.04)
        koleo_loss = 0.1 * torch.stack([self.koleo(crop) for crop in features[:, 0].chunk(2)]).sum()
        return dino_loss + ibot_loss + koleo_loss, koleo_loss

    def after(self) -> None:
        """Move the teachers."""
        update_momentum(self.student, self.teacher, m=TEACHER_MOMENTUM)
        update_momentum(self.head, self.teacher_head, m=TEACHER_MOMENTUM)
        update_momentum(self.patch_head, self.teacher_patch_head, m=TEACHER_MOMENTUM)


def _crops_and_heads(bench: Workbench) -> dict[str, Any]:
    """What DINO and DINOv2 have in common; nothing is frozen at first, and the teacher's temperature stands still."""
    sizes = bench.sizes
    return {
        "small_side": sizes.small_side,
        "small_count": sizes.small_crops,
        "prototypes": sizes.prototypes,
        "head_hidden": sizes.head_hidden,
        "bottleneck": sizes.bottleneck,
        "frozen_prototypes": 0.0,
        "teacher_temperature": 0.04,
    }


def _each(pixels: Tensor, crops: int) -> Sequence[Tensor]:
    """(B * crops, 3, H, W) -> one (B, 3, H, W) for each crop."""
    return [crop.contiguous() for crop in pixels.unflatten(0, (-1, crops)).unbind(1)]


def _lightly_head(bench: Workbench, kind: Any, ours: PrototypeHead) -> Any:
    """lightly's head with the weights of ours; the prototypes have no trained length on either side."""
    sizes = bench.sizes
    head = kind(sizes.width, sizes.head_hidden, sizes.bottleneck, sizes.prototypes)
    head.last_layer.weight_g.requires_grad_(False)
    copy_in_order([*ours.mlp.parameters(), ours.prototypes], [*head.layers.parameters(), head.last_layer.weight_v])
    return head.to(bench.device)


def _frozen(teacher: Any) -> Any:
    """The same module, which will follow a student and not train."""
    deactivate_requires_grad(teacher)
    return teacher.eval()
