"""What each objective's loss holds in memory and sends to the other ranks, by formula."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from training.contrastive_losses import FP32_BOUND, GPU_BLOCK, MOST_KEPT
from training.heads import BatchNormOverRanks
from training.objective import Objective
from training.objectives.clip import LARGEST_SCALE, ClipObjective
from training.objectives.dino import DinoObjective
from training.objectives.dinov2 import DinoV2Objective
from training.objectives.instruct import InstructObjective
from training.objectives.language import LanguageObjective
from training.objectives.mae import MaeObjective
from training.objectives.moco import MocoObjective
from training.objectives.siglip import SiglipObjective
from training.objectives.simclr import SimclrObjective
from training.objectives.words import WordsObjective
from training.picture_text import PictureTextObjective
from training.planning.activations import FULL, head_kept
from training.self_distillation import LARGE_CROPS, SelfDistillation
from training.supervised_loss import CHUNK

IDENTITY = 8  # bytes of one text's identity


@dataclass(frozen=True)
class Message:
    """One collective, `times` a step; `size` is bytes of what one rank brings."""

    kind: Literal["all-reduce", "all-gather", "reduce-scatter", "exchange", "broadcast"]
    size: int
    what: str
    times: int = 1

    def sent(self, ranks: int) -> float:
        """Bytes that one rank sends in a step where collectives go round a ring (Thakur et al. 2005)."""
        share = {
            "all-reduce": 2 * (ranks - 1) / ranks,
            "all-gather": ranks - 1,
            "reduce-scatter": (ranks - 1) / ranks,
            "exchange": 1,
            "broadcast": 1,
        }[self.kind]
        return self.times * self.size * share


@dataclass(frozen=True)
class LossCosts:
    """Bytes of a loss and its heads on one rank: kept for the way back, and beside that at the highest moment."""

    kept: float
    working: float


@dataclass(frozen=True)
class Batch:
    """How a step is made up: samples on each rank, ranks, and the tokens of text in a sample."""

    samples: int
    ranks: int = 1
    tokens: int = 0
    half: bool = False  # bf16 autocast
    named: float = 1.0  # share of patches that `words` names, at most all
    block: int = GPU_BLOCK  # pairs that a contrastive loss works on at once

    @property
    def all(self) -> int:
        """Samples of all ranks."""
        return self.samples * self.ranks


def loss_costs(objective: Objective, batch: Batch, scale: float = LARGEST_SCALE) -> LossCosts:
    """Memory of heads and loss. `scale` is what CLIP multiplies cosines with; it grows to 100 in training."""
    match objective:
        case WordsObjective():
            return _words(objective, batch)
        case ClipObjective():
            return _clip(objective, batch, scale)
        case SiglipObjective():
            return _siglip(objective, batch)
        case SimclrObjective():
            return _simclr(objective, batch)
        case MocoObjective():
            return _moco(objective, batch)
        case DinoV2Objective():
            return _dinov2(objective, batch)
        case DinoObjective():
            return _dino(objective, batch)
        case MaeObjective():
            return _mae(objective, batch)
        case LanguageObjective() | InstructObjective():
            return _next_tokens(objective, batch)
    raise TypeError(f"{type(objective).__name__} is not planned yet: say in loss_costs what its loss holds")


def _exponentials(rows: int, columns: int, pairs: int, size: int, block: int) -> tuple[float, float]:
    """Bytes of exp(logit) of all pairs where they are kept, else of a block; and of the factors of a block."""
    of_block = min(pairs, max(1, block // max(1, columns)) * columns)
    held = pairs if pairs * size <= MOST_KEPT else of_block
    return held * size, of_block * size


def _clip(objective: ClipObjective, batch: Batch, scale: float) -> LossCosts:
    """Each picture with all texts, and each text with the other ranks' pictures; nothing but gradients is kept."""
    n, width = batch.samples, objective.model.config.projection_dim
    size = FULL if scale <= FP32_BOUND else 2 * FULL
    mine, factors = _exponentials(n, batch.all, n * batch.all, size, batch.block)
    theirs, _ = _exponentials(n, batch.all - n, n * (batch.all - n), size, batch.block)
    embeddings = FULL * width * (4 * batch.all + 4 * n)  # everyone's pictures and texts as they came and as joined
    return LossCosts(2 * n * width * FULL, mine + theirs + factors + embeddings)


def _siglip(objective: PictureTextObjective, batch: Batch) -> LossCosts:
    """A block of pairs, and the texts that visit with the gradients that go along."""
    n, width = batch.samples, objective.model.config.text_config.projection_size
    pairs = min(n, max(1, batch.block // n)) * n
    return LossCosts(2 * n * width * FULL, FULL * (pairs + 4 * n * width))


def _words(objective: WordsObjective, batch: Batch) -> LossCosts:
    """SigLIP's, and logits of all words for each picture and each patch that has names."""
    siglip = _siglip(objective, batch)
    grid = objective.tower.grid(objective.side, objective.side)
    patches = batch.named * batch.samples * grid[0] * grid[1]
    words, width = objective.names.out_features, objective.names.in_features
    logits = (patches + batch.samples) * words
    narrow = 2 if batch.half else FULL
    chosen = (patches + batch.samples) * width * narrow
    return LossCosts(siglip.kept + logits * FULL + chosen, siglip.working + logits * (FULL + narrow))


def _simclr(objective: SimclrObjective, batch: Batch) -> LossCosts:
    """Each pair of this rank's views once, and each of its views with all others'."""
    views, everyone, width = 2 * batch.samples, 2 * batch.all, objective.settings.projection
    pairs = views * everyone - views * views // 2
    held, factors = _exponentials(views, everyone, pairs, FULL, batch.block)
    head = head_kept(objective.head, views, batch.half)
    return LossCosts(head + 3 * views * width * FULL, held + factors + FULL * width * (2 * everyone + 2 * views))


def _moco(objective: MocoObjective, batch: Batch) -> LossCosts:
    """Log-probabilities of all keys for each query, both ways; scores and their gradient beside them."""
    n, width = batch.samples, objective.settings.projection
    heads = sum(head_kept(head, 2 * n, batch.half) for head in (objective.projector, objective.predictor))
    scores = n * batch.all * FULL
    keys = 2 * batch.all * width * FULL
    return LossCosts(heads + 2 * scores + keys, 2 * scores)


def _dino(objective: SelfDistillation, batch: Batch) -> LossCosts:
    """The student's scores of all crops and the teacher's probabilities; going back the scores' gradient."""
    prototypes, narrow = objective.settings.prototypes, 2 if batch.half else FULL
    crops = LARGE_CROPS + objective.settings.small_count
    scores = batch.samples * crops * prototypes
    targets = batch.samples * (LARGE_CROPS + bool(objective.settings.small_count)) * prototypes * FULL
    head = head_kept(objective.head, batch.samples * crops, batch.half)
    return LossCosts(head + scores * narrow + targets, scores * narrow)


def _dinov2(objective: DinoV2Objective, batch: Batch) -> LossCosts:
    """DINO's, and the same of the hidden patches that are to be expected."""
    crops = _dino(objective, batch)
    hidden, narrow = expected_hidden(objective, batch.samples), 2 if batch.half else FULL
    scores = hidden * objective.settings.prototypes
    head = objective.patch_head if objective.settings.separate_patch_head else objective.head
    kept = head_kept(head, round(hidden), batch.half) + scores * (narrow + FULL)
    chosen = 2 * LARGE_CROPS * batch.samples * objective.most_hidden * objective.tower.width * FULL
    return LossCosts(crops.kept + kept + chosen, crops.working + scores * narrow)


def expected_hidden(objective: DinoV2Objective, samples: int) -> float:
    """How many patches are hidden in the large crops of `samples` pictures, on average."""
    settings = objective.settings
    patches = objective.grid[0] * objective.grid[1]
    return samples * LARGE_CROPS * settings.masked_crops * sum(settings.masked) / 2 * patches


def _mae(objective: MaeObjective, batch: Batch) -> LossCosts:
    """Predicted and true values of the hidden patches."""
    values = batch.samples * (objective.patches - objective.seen) * 3 * objective.tower.patch_size**2
    return LossCosts(2 * values * FULL, 2 * values * FULL)


def _next_tokens(objective: LanguageObjective | InstructObjective, batch: Batch) -> LossCosts:
    """Gradients of hidden states and of the output embedding, and the logits of a chunk of tokens on a GPU."""
    head = objective.model.get_output_embeddings().weight
    tokens = batch.samples * batch.tokens
    gradients = tokens * head.shape[1] * FULL + head.numel() * FULL
    size = FULL + 2 if batch.half else FULL  # the product, and what the loss is computed from
    return LossCosts(gradients, min(tokens, CHUNK) * head.shape[0] * size)


def messages(objective: Objective, batch: Batch, scale: float = LARGEST_SCALE) -> list[Message]:
    """What the loss and the heads of one step send; an accumulated step compares once, so it sends the same."""
    return list(_messages(objective, batch, scale))


def _messages(objective: Objective, batch: Batch, scale: float) -> Iterator[Message]:
    n, ranks = batch.samples, batch.ranks
    match objective:
        case ClipObjective():
            size = FULL if scale <= FP32_BOUND else 2 * FULL
            width = objective.model.config.projection_dim
            yield Message("all-gather", 2 * n * width * FULL, "embeddings of pictures and texts")
            yield Message("all-gather", 2 * n * size, "sums of exponentials")
            yield Message("all-gather", n * IDENTITY, "identities of texts")
        case SiglipObjective():
            texts = n * objective.model.config.text_config.projection_size * FULL
            yield Message("exchange", texts, "texts, from rank to rank", ranks - 1)
            yield Message("exchange", texts, "gradients of the texts", ranks)
            yield Message("exchange", n * IDENTITY, "identities of texts", ranks - 1)
            if isinstance(objective, WordsObjective):
                yield Message("all-reduce", FULL, "how many rows are named", 2)
                yield Message("all-reduce", objective.counts.numel() * FULL, "how often each word was said")
        case SimclrObjective():
            yield Message("all-gather", 2 * n * objective.settings.projection * FULL, "embeddings of views")
            yield Message("all-gather", 2 * n * FULL, "sums of exponentials")
            yield from _norms(objective.head, ranks, "batch norm of the head")
        case MocoObjective():
            yield Message("all-gather", n * objective.settings.projection * FULL, "keys", 2)
            for head in (objective.projector, objective.predictor):
                yield from _norms(head, ranks, "batch norm of a head", views=2)
            yield from _norms(objective.teacher_projector.model, ranks, "batch norm of the teacher", 2, back=False)
        case DinoV2Objective():
            prototypes, kinds = objective.settings.prototypes * FULL, 2
            yield Message("all-gather", prototypes, "highest scores", kinds)
            rounds = kinds * objective.settings.sinkhorn_iterations
            yield Message("all-reduce", prototypes, "sums of Sinkhorn-Knopp", rounds)
            yield from _koleo(objective, batch)
        case DinoObjective():
            yield Message("all-reduce", objective.settings.prototypes * FULL, "centre")
            yield from _koleo(objective, batch)


def _koleo(objective: SelfDistillation, batch: Batch) -> Iterator[Message]:
    """What is sent where pooled outputs are spread: those of the large crops, and their gradients."""
    if objective.settings.koleo_weight:
        features = batch.samples * objective.tower.width * FULL
        yield Message("all-gather", features, "features for KoLeo", LARGE_CROPS)
        yield Message("all-reduce", batch.ranks * features, "gradients of KoLeo", LARGE_CROPS)


def _norms(head: nn.Module, ranks: int, what: str, views: int = 1, back: bool = True) -> Iterator[Message]:
    """Mean and variance of each batch norm over the ranks, and going back the gradients that all ranks have of both."""
    widths = [module.num_features for module in head.modules() if isinstance(module, BatchNormOverRanks)]
    for width in widths:
        yield Message("all-gather", width * FULL, what, 2 * views)
        if back:
            yield Message("all-reduce", ranks * width * FULL, f"gradients of the {what}", 2 * views)
