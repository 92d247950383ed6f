"""Visual instruction tuning: predict the assistant's words, given pictures and the words before them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from assistant.chat import IMAGE_TOKEN, EncodedConversation, assistant_message, encode_conversation, user_message
from assistant.checkpoint import save_llava
from assistant.fusion import unused_tower_parameters
from assistant.towers import normalised
from training.objective import Objective
from training.supervised_loss import supervised_cross_entropy

Part = Literal["tower", "projector", "language"]
PREFIXES: dict[Part, tuple[str, ...]] = {
    "tower": ("model.model.vision_tower.",),
    "projector": ("model.model.multi_modal_projector.",),
    "language": ("model.model.language_model.", "model.lm_head."),
}
LENGTH_MULTIPLE = 32  # tokens; each new length of a batch costs a CPU a fifth of a second of kernel preparation


@dataclass(frozen=True)
class Lesson:
    """Pictures, uint8 (3, side, side) each, and what is asked about them, answer by answer.

    The turns are independent of each other (each sees the pictures only) unless `is_dialogue`.
    """

    name: str
    views: tuple[Tensor, ...]
    turns: tuple[tuple[str, str], ...]
    is_dialogue: bool = False


@dataclass(frozen=True)
class PackedLesson:
    """T tokens of one lesson: a shared beginning, then its conversations side by side."""

    ids: Tensor  # (T,) int64
    supervised: Tensor  # (T,) bool
    weights: Tensor  # (T,) float32
    positions: Tensor  # (T,) int64
    branch: Tensor  # (T,) int64; 0 is the shared beginning


class InstructObjective(Objective):
    """Trains the named parts of a LLaVA on lessons.

    Questions about one picture share its tokens: each conversation attends to the shared beginning and to itself, with
    the positions it would have alone. The losses are those of separate conversations, at a third of the work.
    """

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        processor: LlavaProcessor,
        trains: Sequence[Part],
        longest: int,
        length_power: float = 0.0,
        rates: Mapping[Part, float] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.processor = processor
        self.trains = tuple(trains)
        self.longest = longest
        self.length_power = length_power
        self.rates = dict(rates or {})

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        """Weighted mean loss over supervised tokens, and the share of them that greedy decoding would get right."""
        hidden = self.model.model(
            input_ids=batch["ids"],
            pixel_values=normalised(batch["views"], self.processor.image_processor) if "views" in batch else None,
            attention_mask=self._mask(batch["attends"]),
            position_ids=batch["positions"],
            use_cache=False,
        ).last_hidden_state
        hidden = hidden[batch["predicts"]]
        head = self.model.get_output_embeddings().weight
        return {"answer_loss": supervised_cross_entropy(hidden, head, batch["targets"], batch["weights"])}

    def _mask(self, attends: Tensor) -> Tensor:
        # transformers' eager attention adds its mask to the scores; the fused ones select with it.
        if self.model.config.text_config._attn_implementation != "eager":
            return attends
        return torch.zeros(attends.shape, device=attends.device).masked_fill_(~attends, torch.finfo(torch.float16).min)

    def collate(self, samples: Sequence[Lesson]) -> Mapping[str, Tensor]:
        """ids, positions, predicts (B, T); attends (B, 1, T, T); targets, weights (S,); views (pictures, 3, H, W)."""
        packed = [self.pack(lesson) for lesson in samples]
        length = max(len(p.ids) for p in packed)
        length += -length % LENGTH_MULTIPLE
        pad = self.processor.tokenizer.pad_token_id
        ids = torch.full((len(packed), length), pad)
        positions = torch.zeros_like(ids)
        attends = torch.eye(length, dtype=torch.bool).repeat(len(packed), 1, 1, 1)
        predicts = torch.zeros(ids.shape, dtype=torch.bool)
        targets, weights = [], []
        for row, lesson in enumerate(packed):
            size = len(lesson.ids)
            ids[row, :size], positions[row, :size] = lesson.ids, lesson.positions
            attends[row, 0, :size, :size] = attention_of(lesson.branch)
            before = predictor_of(lesson)
            # Sorted by the place that predicts, because boolean indexing of the hidden states reads them in order.
            order = before.argsort()
            predicts[row, before] = True
            targets.append(lesson.ids[lesson.supervised][order])
            weights.append(lesson.weights[lesson.supervised][order])
        batch = {"ids": ids, "positions": positions, "attends": attends, "predicts": predicts}
        batch |= {"targets": torch.cat(targets), "weights": torch.cat(weights)}
        views = [view for lesson in samples for view in lesson.views]
        return batch | {"views": torch.stack(views)} if views else batch

    def pack(self, lesson: Lesson) -> PackedLesson:
        """Encode the turns of `lesson` and lay them side by side after their shared beginning.

        Turns that would pass `longest` are left out, from the end; picture tokens are never cut.
        """
        encoded = [
            self._encode(lesson, turns) for turns in ([lesson.turns] if lesson.is_dialogue else zip(lesson.turns))
        ]
        shared = self._shared_length(encoded) if len(encoded) > 1 else 0
        ids, supervised, weights = encoded[0].ids[:shared], [False] * shared, [0.0] * shared
        positions, branch = list(range(shared)), [0] * shared
        for number, conversation in enumerate(encoded, start=1):
            rest = len(conversation.ids) - shared
            if len(ids) + rest > self.longest and number > 1:
                break
            ids = ids + conversation.ids[shared:]
            supervised = supervised + conversation.supervised[shared:]
            weights = weights + [sum(conversation.supervised) ** -self.length_power] * rest
            positions += range(shared, shared + rest)
            branch += [number] * rest
        if len(ids) > self.longest:
            raise ValueError(f"lesson {lesson.name} has {len(ids)} tokens, more than {self.longest}; shorten its words")
        return PackedLesson(
            torch.tensor(ids),
            torch.tensor(supervised),
            torch.tensor(weights),
            torch.tensor(positions),
            torch.tensor(branch),
        )

    def _encode(self, lesson: Lesson, turns: Sequence[tuple[str, str]]) -> EncodedConversation:
        messages = []
        for number, (question, answer) in enumerate(turns):
            messages += [user_message(question, len(lesson.views) if number == 0 else 0), assistant_message(answer)]
        return encode_conversation(self.processor.tokenizer, messages, tokens_per_picture(self.processor))

    def _shared_length(self, encoded: Sequence[EncodedConversation]) -> int:
        image_id = self.processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        same = takewhile(lambda column: len(set(column)) == 1, zip(*(e.ids for e in encoded), strict=False))
        common = [column[0] for column in same]
        # Share up to the last picture token only: words that happen to agree are cheap and belong to their question.
        return len(common) - common[::-1].index(image_id) if image_id in common else 0

    def trained_parameters(self) -> set[str]:
        """The parameters of the parts in `trains`, less those of the tower that the assistant never looks through."""
        prefixes = tuple(prefix for part in self.trains for prefix in PREFIXES[part])
        unused = {f"model.{name}" for name in unused_tower_parameters(self.model)}
        return {name for name, _ in self.named_parameters() if name.startswith(prefixes)} - unused

    def rate_of(self, name: str) -> float:
        """What the recipe says of the part that `name` belongs to."""
        return next((rate for part, rate in self.rates.items() if name.startswith(PREFIXES[part])), 1.0)

    def export(self, folder: Path) -> None:
        """A LLaVA checkpoint in the published layout."""
        save_llava(self.model, self.processor, folder)


def tokens_per_picture(processor: LlavaProcessor) -> int:
    """N, the tokens one picture takes: the patches of the square that the processor resizes to."""
    size = processor.image_processor.size
    return (size["height"] // processor.patch_size) * (size["width"] // processor.patch_size)


def attention_of(branch: Tensor) -> Tensor:
    """(T, T) bool: which places (columns) each place (row) attends to, given the branch (T,) of each."""
    places = torch.arange(len(branch))
    causal = places[:, None] >= places[None, :]
    return causal & ((branch[None, :] == 0) | (branch[:, None] == branch[None, :]))


def predictor_of(lesson: PackedLesson) -> Tensor:
    """For each supervised place, the place that predicts it: the one before it in its own conversation."""
    places = lesson.supervised.nonzero().flatten()
    if (lesson.branch[places - 1] != lesson.branch[places]).any():
        raise ValueError("a supervised token stands right after the shared beginning; every answer needs a question")
    return places - 1
