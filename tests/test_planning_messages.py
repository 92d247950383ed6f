"""What plan says a step sends is what two real processes send: every collective is counted, and none is left out."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from scripts.measure_costs import CASES, prepared, prepared_language, stage_of
from serving.engine import free_port
from tests.ranks import RANKS, as_launched, on_two_ranks
from training.objective import Objective, total_loss
from training.planning.costs import WAYS, Costs, Step
from training.planning.losses import Message, messages
from training.planning.subjects import Subjects
from training.stages import Workshop

SAMPLES = 4
STAGES = {name: stage_of(name) for name in CASES} | {
    "dino with KoLeo": stage_of("dino", settings=CASES["dino"][0] | {"koleo_weight": 0.1}),
    "dinov2 without": stage_of("dinov2", settings=CASES["dinov2"][0] | {"koleo_weight": 0.0}),
}
SHARDED = ("siglip", "mae", "moco", "dinov2")


class Sent:
    """Counts bytes that this rank brings to each kind of collective, from outside of all our code."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.counting = False
        self._wrap("all_reduce", "all-reduce", lambda tensor, *rest, **named: [tensor])
        self._wrap("all_gather", "all-gather", lambda into, tensor, *rest, **named: [tensor])
        self._wrap("all_gather_single", "all-gather", lambda into, tensor, **named: [tensor])
        self._wrap("reduce_scatter_single", "reduce-scatter", lambda **named: [named["input"]])
        self._wrap("batch_isend_irecv", "exchange", lambda both: [one.tensor for one in both if is_sent(one)])
        self._wrap("_broadcast_coalesced", "broadcast", lambda group, tensors, *rest: tensors)

    def _wrap(self, name: str, kind: str, of: Any) -> None:
        original = getattr(distributed, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            if self.counting:
                tensors: Sequence[torch.Tensor] = of(*arguments, **named)
                self.bytes[kind] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            return original(*arguments, **named)

        setattr(distributed, name, counted)

    def of_a_step(self, model: nn.Module, objective: Objective, batch: Any) -> dict[str, int]:
        """Bytes by kind of one forward, backward and what follows the optimiser."""
        self.bytes.clear()
        self.counting = True
        total_loss(model(**batch)).backward()
        objective.after_step(0, 100)
        self.counting = False
        return dict(self.bytes)


def is_sent(transfer: distributed.P2POp) -> bool:
    return transfer.op is distributed.isend


def run_rank(rank: int, folder: Path, port: int) -> None:
    """What one of two processes does: a step of each objective by DDP, and of some by FSDP."""
    as_launched(rank, port)
    distributed.init_process_group("gloo", rank=rank, world_size=RANKS)
    sent, told = Sent(), {}
    for name in (*STAGES, "language"):
        subject = prepared_language(SAMPLES) if name == "language" else prepared(STAGES[name], SAMPLES)
        model = DistributedDataParallel(subject.objective, find_unused_parameters=True)
        # By the hook the reducer calls torch.distributed from Python, where it can be counted.
        model.register_comm_hook(None, default_hooks.allreduce_hook)
        told[name] = sent.of_a_step(model, subject.objective, subject.batch)
    mesh = init_device_mesh("cpu", (RANKS,))
    for name in SHARDED:
        subject = prepared(stage_of(name), SAMPLES)
        for stack in [module for module in subject.objective.modules() if isinstance(module, nn.ModuleList)]:
            for layer in stack:
                fully_shard(layer, mesh=mesh)
        fully_shard(subject.objective, mesh=mesh)
        told[f"{name}, sharded"] = sent.of_a_step(subject.objective, subject.objective, subject.batch)
    if rank == 0:
        (folder / "sent.json").write_text(json.dumps(told))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Bytes by kind that the first of two processes brought, by objective."""
    folder = tmp_path_factory.mktemp("sent")
    on_two_ranks(run_rank, folder, free_port())
    return dict(json.loads((folder / "sent.json").read_text()))


def costs_of(name: str) -> Costs:
    """The formulas for a small objective."""
    stage = STAGES[name]
    return Costs(stage, Subjects(Workshop(Path("nowhere"), None)).objective(stage))


def by_kind(planned: Sequence[Message]) -> dict[str, int]:
    """Bytes that one rank brings, by kind."""
    sums: Counter[str] = Counter()
    for message in planned:
        sums[message.kind] += message.times * message.size
    return dict(sums)


def planned_messages(costs: Costs, way: int) -> list[Message]:
    """Of a step of two ranks, in which CLIP's scale is where it starts."""
    step = Step(costs.stage, RANKS, SAMPLES, 1, False, WAYS[way])
    own = len(messages(costs.objective, costs.batch(step)))
    told = costs.messages(step)
    return told[: len(told) - own] + messages(costs.objective, costs.batch(step), scale=14.3)


@pytest.mark.parametrize("name", STAGES)
def test_a_step_sends_to_the_byte_what_the_formulas_say(name: str, sent: dict[str, dict[str, int]]) -> None:
    assert sent[name] == by_kind(planned_messages(costs_of(name), way=0))


def test_a_language_model_sends_its_gradients_alone(sent: dict[str, dict[str, int]]) -> None:
    trained = sum(weight.numel() * 4 for weight in prepared_language(1).objective.parameters())
    assert sent["language"]["all-reduce"] == trained
    assert set(sent["language"]) <= {"all-reduce", "broadcast"}


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_weights_are_sent_as_the_formulas_say(name: str, sent: dict[str, dict[str, int]]) -> None:
    """FSDP fills up what does not divide; beside that the bytes are those of the formulas."""
    planned = by_kind(planned_messages(costs_of(name), way=2))
    really = sent[f"{name}, sharded"]
    assert really.keys() == planned.keys()
    for kind, size in planned.items():
        assert really[kind] == pytest.approx(size, rel=0.05), kind


@pytest.mark.parametrize(
    ("kind", "by_hand"),
    [("all-reduce", 2 * 7 * 1000 / 8), ("all-gather", 7 * 1000), ("reduce-scatter", 7 * 1000 / 8), ("exchange", 1000)],
)
def test_a_ring_sends_what_is_counted_hop_by_hop(kind: Any, by_hand: float) -> None:
    """Eight ranks, 1000 bytes each: R - 1 hops of an eighth for each half of an all-reduce, of all for a gather."""
    assert Message(kind, 1000, "x").sent(8) == by_hand
    assert Message(kind, 1000, "x", times=3).sent(8) == 3 * by_hand
