"""Visual instruction tuning: predict the assistant's words, given pictures and the words before them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys

from assistant.chat import IMAGE_TOKEN
from assistant.checkpoint import save_llava
from assistant.fusion import unused_tower_parameters
from assistant.projectors import Llava, picture_features, picture_tokens, unused_projector_parameters
from assistant.tiles import Processor, cut, tokens_per_picture
from assistant.tower_shapes import output_side
from assistant.towers import normalised
from training.adapters import Adapter, export_adapted
from training.feature_cache import FeatureCache, content_key
from training.lessons import Lesson, PackedLesson, answers_of, in_one_row, in_rows, pack
from training.objective import Objective
from training.segment_attention import attend_by_segments
from training.sharding import is_sharded
from training.supervised_loss import supervised_cross_entropy

__all__ = ["PREFIXES", "InstructObjective", "Lesson", "Part", "tokens_per_picture"]

Part = Literal["tower", "projector", "language"]
PREFIXES: dict[Part, tuple[str, ...]] = {
    "tower": ("model.model.vision_tower.",),
    # What stands behind each row of a tiled picture is no word: it is learned with what makes pictures readable.
    "projector": ("model.model.multi_modal_projector.", "model.model.image_newline"),
    "language": ("model.model.language_model.", "model.lm_head."),
}


class InstructObjective(Objective):
    """Trains the named parts of a LLaVA on lessons.

    Questions about one picture share its tokens: each conversation attends to the shared beginning and to itself, with
    the positions it would have alone. The losses are those of separate conversations, at a third of the work.
    """

    def __init__(
        self,
        model: Llava,
        processor: Processor,
        trains: Sequence[Part],
        longest: int,
        length_power: float = 0.0,
        rates: Mapping[Part, float] | None = None,
        adapter: Adapter | None = None,
        packing: bool = False,
        features: FeatureCache | None = None,
    ) -> None:
        """`features` keeps what a tower that does not train makes of pictures that come again as they are.

        With an `adapter` it is what trains of the language model. With `packing` lessons lie in one row, without
        padding between them, and attend by segments; the losses are the same.
        """
        super().__init__()
        self.model = model
        self.processor = processor
        self.trains = tuple(trains)
        self.longest = longest
        self.length_power = length_power
        self.rates = dict(rates or {})
        self.adapter = adapter
        self.packing = packing
        self.features = features
        if packing:
            attend_by_segments(model.model.language_model)

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        """Weighted loss over supervised tokens: their mean, or with `step_weight` their part of a whole step's.

        `step_weight` is the sum of all weights of a step over its micro-batches and ranks, divided by their number:
        the mean of the losses over them is then the weighted mean over all tokens of the step.
        """
        hidden = self.model.model.language_model(
            inputs_embeds=self._embedded(batch),
            position_ids=batch["positions"],
            use_cache=False,
            **self._attention(batch),
        ).last_hidden_state
        hidden = hidden[batch["predicts"]]
        head = self.model.get_output_embeddings().weight
        loss = supervised_cross_entropy(
            hidden, head, batch["targets"], batch["weights"], total_weight=batch.get("step_weight")
        )
        return {"answer_loss": loss}

    def _embedded(self, batch: Mapping[str, Any]) -> Tensor:
        """(B, T, D): words and picture tokens, each in its place."""
        embedded = self.model.get_input_embeddings()(batch["ids"])
        if "views" in batch:
            seen = self._seen(batch).to(embedded.dtype)
            return embedded.masked_scatter((batch["ids"] == self._image_id)[..., None], seen)
        if not _is_one_of_several_processes():
            return embedded
        # The others wait for this one wherever they exchange weights or gradients of the tower and the projector.
        blank = self._views([torch.zeros(3, *self._view_size, dtype=torch.uint8)])
        return embedded + 0 * self._seen({name: value.to(embedded.device) for name, value in blank.items()}).sum()

    def _seen(self, batch: Mapping[str, Any]) -> Tensor:
        """What stands in the places of the picture token, picture behind picture."""
        return picture_tokens(self.model, self._features(batch), batch.get("sizes"))

    def _features(self, batch: Mapping[str, Any]) -> Tensor:
        """What the projector reads of the views of `batch`; from the cache where there is one."""
        if "tower" in self.trains:
            return self._computed(batch["views"])
        with torch.no_grad():
            if self.features is None or "keys" not in batch:
                return self._computed(batch["views"])
            return self.features.features(batch["views"], batch["keys"], self._computed)

    def _computed(self, views: Tensor) -> Tensor:
        return picture_features(self.model, normalised(views, self.processor.image_processor))

    def _attention(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {"segments": batch["segments"]} if self.packing else {"attention_mask": self._mask(batch["attends"])}

    def train(self, mode: bool = True) -> "InstructObjective":
        """As torch's, but a tower that does not train never drops a layer: what it sees is always the same."""
        super().train(mode)
        if "tower" not in self.trains:
            self.model.model.vision_tower.eval()
        return self

    @property
    def _image_id(self) -> int:
        return int(self.processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))

    @property
    def _view_size(self) -> tuple[int, int]:
        side = output_side(self.processor.image_processor)
        return side, side

    def _mask(self, attends: Tensor) -> Tensor:
        # transformers' eager attention adds its mask to the scores; the fused ones select with it.
        if self.model.config.text_config._attn_implementation != "eager":
            return attends
        return torch.zeros(attends.shape, device=attends.device).masked_fill_(~attends, torch.finfo(torch.float16).min)

    def collate(self, samples: Sequence[Lesson]) -> Mapping[str, Any]:
        """One batch: ids, positions, predicts (B, T); targets, weights (S,); views (pictures, 3, H, W), keys of them.

        Where pictures are cut into tiles, views are those of all pictures and sizes (pictures, 2) tell which are whose.
        Padded rows come with attends (B, 1, T, T); with packing B is 1 and the segments are named.
        """
        packed, pad = [self.pack(lesson) for lesson in samples], self.processor.tokenizer.pad_token_id
        batch = (in_one_row if self.packing else in_rows)(packed, pad) | answers_of(packed)
        pictures = [picture for lesson in samples for picture in lesson.views]
        if pictures:
            batch |= self._views(pictures)
            if self.features is not None:
                batch["keys"] = torch.stack([content_key(view) for view in batch["views"]])
        return batch

    def _views(self, pictures: Sequence[Tensor]) -> dict[str, Tensor]:
        views, sizes = cut(self.processor, pictures)
        return {"views": views} if sizes is None else {"views": views, "sizes": sizes}

    def pack(self, lesson: Lesson) -> PackedLesson:
        """The tokens of `lesson` for this model, see `lessons.pack`."""
        return pack(lesson, self.processor, self.longest, self.length_power)

    def trained_parameters(self) -> set[str]:
        """The parameters of the parts in `trains`, less those that no answer depends on.

        Of the language model these are the adapter's alone where there is one.
        """
        prefixes = tuple(prefix for part in self.trains for prefix in PREFIXES[part] if not self._adapts(part))
        unused = unused_tower_parameters(self.model) | unused_projector_parameters(self.model)
        whole = {name for name, _ in self.named_parameters() if name.startswith(prefixes)} if prefixes else set()
        adapted = self.adapter.parameters() if self.adapter is not None else set()
        return (whole - {f"model.{name}" for name in unused}) | {f"model.{name}" for name in adapted}

    def _adapts(self, part: Part) -> bool:
        return part == "language" and self.adapter is not None

    def tokens_of(self, batch: Mapping[str, Any]) -> int:
        """Tokens of words and pictures, without padding."""
        return int((batch["ids"] != self.processor.tokenizer.pad_token_id).sum())

    def rate_of(self, name: str) -> float:
        """What the recipe says of the part that `name` belongs to."""
        return next((rate for part, rate in self.rates.items() if name.startswith(PREFIXES[part])), 1.0)

    def state_dict(self, *arguments: Any, **named: Any) -> dict[str, Any]:  # type: ignore[override]
        """What trains, and nothing else: a checkpoint on the way need not hold the parts that stand still."""
        whole = super().state_dict(*arguments, **named)
        if arguments or named or is_sharded(self):
            return whole
        trained = self.trained_parameters()
        return {name: value for name, value in whole.items() if name in trained}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` gave; what stands still is not missed."""
        missing, unexpected = super().load_state_dict(state_dict, strict=False, assign=assign)
        missed = sorted(set(missing) & self.trained_parameters())
        if strict and (missed or unexpected):
            raise RuntimeError(f"these weights are of another stage: {[*missed, *unexpected][:3]}")
        return _IncompatibleKeys(missed, list(unexpected))

    def export(self, folder: Path) -> None:
        """A checkpoint in the published layout; with an adapter, both merged, and the adapter and its base inside."""
        if self.adapter is None:
            save_llava(self.model, self.processor, folder)
        else:
            baked = self.trained_parameters() - {f"model.{name}" for name in self.adapter.parameters()}
            export_adapted(self.model, self.adapter, {name.removeprefix("model.") for name in baked}, folder)


def _is_one_of_several_processes() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
