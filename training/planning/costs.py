"""What one step of a stage costs each device: memory by part, bytes sent, and how large a batch fits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from training.config import InstructStage, LanguageStage, TowerStage
from training.objective import Objective, WholeBatchObjective
from training.planning.activations import FULL, kept_by, recomputed
from training.planning.losses import Batch, Message, loss_costs, messages
from training.planning.passes import Passes, passes_of, training_flops
from training.self_distillation import SelfDistillation
from training.teacher import Teacher

TrainedStage = TowerStage | LanguageStage | InstructStage
SPARE = 0.1  # share of a device's memory left to the driver, the libraries' scratch and fragmentation
LARGEST_TRIED = 2**20  # samples on one device


@dataclass(frozen=True)
class Weights:
    """Bytes of what a step holds whatever its batch is; exact, for fp32 weights and AdamW."""

    trained: int
    frozen: int
    teachers: int
    buffers: int
    gradients: int
    optimiser: int
    in_layers: int  # of `trained` and `frozen`, what stands in stacked layers
    outside: int  # what stands in no layer, teachers' too
    largest_layer: int
    half_copies: int  # what bf16 autocast makes of the maps that train


def weights_of(objective: Objective) -> Weights:
    """Counted on `objective` itself, which may be on the meta device."""
    trained = objective.trained_parameters()
    maps = {id(one.weight) for one in objective.modules() if isinstance(one, nn.Linear | nn.Conv2d)}
    in_teachers = {id(w) for one in objective.modules() if isinstance(one, Teacher) for w in one.parameters()}
    sizes = {"trained": 0, "frozen": 0, "teachers": 0}
    held: set[int] = set()  # what is in no teacher
    tensors = copies = 0
    for name, weight in objective.named_parameters():
        size = weight.numel() * weight.element_size()
        kind = "trained" if name in trained else "teachers" if id(weight) in in_teachers else "frozen"
        sizes[kind] += size
        held |= set() if kind == "teachers" else {id(weight)}
        tensors += name in trained
        copies += weight.numel() * 2 if name in trained and id(weight) in maps else 0
    layers = [layer for stack in objective.modules() if isinstance(stack, nn.ModuleList) for layer in stack]
    layered = {id(w): w.numel() * FULL for layer in layers for w in layer.parameters()}
    return Weights(
        **sizes,
        buffers=sum(buffer.numel() * buffer.element_size() for buffer in objective.buffers()),
        gradients=sizes["trained"],
        optimiser=2 * sizes["trained"] + tensors * FULL,  # two moments, and each tensor's count of steps
        in_layers=sum(size for weight, size in layered.items() if weight in held),
        outside=sum(sizes.values()) - sum(layered.values()),
        largest_layer=max((sum(w.numel() * FULL for w in layer.parameters()) for layer in layers), default=0),
        half_copies=copies,
    )


@dataclass(frozen=True)
class Way:
    """How a step is laid out over devices."""

    sharded: bool = False  # FSDP, else DistributedDataParallel
    checkpointed: bool = False

    def __str__(self) -> str:
        return ("FSDP" if self.sharded else "DDP") + (", checkpointed" if self.checkpointed else "")


# From the fastest to the thriftiest.
WAYS = (Way(), Way(checkpointed=True), Way(sharded=True), Way(sharded=True, checkpointed=True))


@dataclass(frozen=True)
class Step:
    """A stage as it is launched: `samples` at once on each of `devices`, `accumulation` times a step."""

    stage: TrainedStage
    devices: int
    samples: int
    accumulation: int
    half: bool
    way: Way

    @property
    def all_samples(self) -> int:
        """Samples of one step over all devices."""
        return self.devices * self.samples * self.accumulation


class Costs:
    """The formulas for one objective of one stage."""

    def __init__(self, stage: TrainedStage, objective: Objective) -> None:
        self.stage, self.objective = stage, objective
        self.weights = weights_of(objective)
        self.tokens = tokens_of(stage)
        self.passes: Sequence[Passes] = passes_of(objective, self.tokens or None)

    def memory(self, step: Step) -> dict[str, float]:
        """Bytes by part on one device."""
        held, share = self.weights, step.devices if step.way.sharded else 1
        parts = {
            "weights": (held.trained + held.frozen) / share + held.buffers,
            "teacher": held.teachers / share,
            "gradients": held.gradients / share,
            "AdamW": held.optimiser / share,
            "bf16 copies": float(held.half_copies) / share if step.half else 0.0,
        }
        if step.way.sharded:
            # One layer at work and the next on its way; what is in no layer stays from forward to back.
            parts["gathered"] = (2.0 * held.largest_layer + held.outside) / (2 if step.half else 1)
        elif step.devices > 1:
            parts["DDP's buckets"] = float(held.gradients)
        parts["activations"] = kept_by(self.passes, step.samples, step.half, step.way.checkpointed)
        if step.way.checkpointed:
            parts["a layer again"] = recomputed(self.passes, step.samples, step.half)
        loss = loss_costs(self.objective, self.batch(step))
        return parts | {"heads and loss": loss.kept, "loss, working": loss.working}

    def batch(self, step: Step) -> Batch:
        """What a loss sees of `step`: all its samples where it compares them, else those that come at once."""
        together = step.samples * (step.accumulation if isinstance(self.objective, WholeBatchObjective) else 1)
        return Batch(together, step.devices, self.tokens, step.half)

    def messages(self, step: Step) -> list[Message]:
        """All that one rank brings to collectives in one step."""
        if step.devices == 1:
            return []
        held = self.weights
        if step.way.sharded:
            narrow = 2 if step.half else 1
            parts = [
                Message("all-gather", self._gathered(step) // narrow // step.devices, "weights"),
                Message("reduce-scatter", held.gradients // narrow, "gradients", step.accumulation),
            ]
        else:
            parts = [Message("all-reduce", held.gradients, "gradients")]
            # DistributedDataParallel copies rank 0's buffers before each forward that follows one which synchronised
            # gradients; an accumulated step of a whole batch synchronises by itself.
            if held.buffers and (step.accumulation == 1 or not isinstance(self.objective, WholeBatchObjective)):
                parts.append(Message("broadcast", held.buffers, "buffers"))
        return parts + messages(self.objective, self.batch(step))

    def _gathered(self, step: Step) -> int:
        """Bytes of all weights that FSDP brings together in a step.

        Layers going forward and again going back, each time the tower is called; what is in no layer once. A teacher
        goes forward only, and one of its layers is fetched in vain going back. Parts of a step repeat it all, and those
        of a whole batch go forward twice.
        """
        held, objective = self.weights, self.objective
        small = isinstance(objective, SelfDistillation) and objective.settings.small_count > 0
        again = isinstance(objective, WholeBatchObjective) and step.accumulation > 1
        calls = (3 if again else 2) * (2 if small else 1)
        outside = held.trained + held.frozen - held.in_layers
        teacher = held.teachers + held.largest_layer if held.teachers else 0
        return step.accumulation * (outside + calls * held.in_layers + teacher)

    def sent(self, step: Step) -> float:
        """Bytes that one device sends in a step."""
        return sum(message.sent(step.devices) for message in self.messages(step))

    def flops(self, step: Step) -> float:
        """FLOPs of one step on one device."""
        again = 4 / 3 if step.way.checkpointed else 1.0
        return training_flops(self.passes) * step.samples * step.accumulation * again

    def largest_batch(self, step: Step, memory: float) -> int:
        """The most samples on one device at once whose step fits into `memory` bytes; 0 where not even one does."""

        def fits(samples: int) -> bool:
            return sum(self.memory(replace(step, samples=samples)).values()) <= memory * (1 - SPARE)

        if not fits(1):
            return 0
        low, high = 1, 2
        while high < LARGEST_TRIED and fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low


def tokens_of(stage: TrainedStage) -> int:
    """Tokens of text in one sample, at most; 0 where pictures alone, or pictures and texts of one length, train."""
    match stage:
        case LanguageStage():
            return stage.block
        case InstructStage():
            return stage.longest
    return 0
