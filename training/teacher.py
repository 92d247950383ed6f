"""A frozen copy of a module that follows it as a moving average, and how much its probabilities tell."""

import copy
import math
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from training.sharding import local

Student = TypeVar("Student", bound=nn.Module)
MOST_ASKED = 32  # samples a step whose entropy is taken; all of them would cost as much as a part of the loss


class Teacher(nn.Module, Generic[Student]):
    """An averaged copy of `student`, in `model`; it never trains.

    The average is that of mean teacher (Tarvainen & Valpola 2017), as MoCo and DINO use it. Its weights and buffers are
    part of its `state_dict`; the student is not. It has neither dropout nor stochastic depth. A batch norm uses its own
    batches while training, as in the code of MoCo v3 and DINO, and keeps its own statistics: the student's would belong
    to other weights. All other buffers are copied.
    """

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.model: Student = copy.deepcopy(student).requires_grad_(False)
        # In a tuple it is no submodule, so it is neither saved nor trained a second time.
        self._student = (student,)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Evaluation mode for everything but the batch norms, which follow `mode`."""
        super().train(False)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.train(mode)
        return self

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """Each weight becomes `momentum` x itself + (1 - `momentum`) x the student's."""
        student = self._student[0]
        own = [local(weight) for weight in self.model.parameters()]
        theirs = [local(weight.detach()) for weight in student.parameters()]
        torch._foreach_lerp_(own, theirs, 1.0 - momentum)
        for module, other in zip(self.model.modules(), student.modules(), strict=True):
            if not isinstance(module, _BatchNorm):
                for name, buffer in module.named_buffers(recurse=False):
                    buffer.copy_(other.get_buffer(name))


def names_outside_teachers(module: nn.Module) -> set[str]:
    """The parameters of `module`, by name, that are in none of the teachers which it has as children."""
    teachers = tuple(f"{name}." for name, child in module.named_children() if isinstance(child, Teacher))
    return {name for name, _ in module.named_parameters() if not name.startswith(teachers)}


@torch.no_grad()
def target_facts(probabilities: Tensor) -> dict[str, Tensor]:
    """For the log: how sharp a teacher's (B, G, K) probabilities are, and how many prototypes its samples use.

    `teacher_entropy` is the mean entropy of one crop's probabilities as a share of ln K: 1 where all prototypes are
    alike to it, 0 where it names one. `prototypes_used` is the exponential of the entropy of the mean over all crops of
    this rank: 1 where all of them name the same one. DINO collapses to the first without sharpening, and to the second
    without centring (Caron et al. 2021, section 5.3).
    """
    asked, everyone = probabilities[:MOST_ASKED].float(), probabilities.float().flatten(0, -2).mean(0)
    return {
        "teacher_entropy": torch.special.entr(asked).sum(-1).mean() / math.log(probabilities.shape[-1]),
        "prototypes_used": torch.special.entr(everyone).sum().exp(),
    }
