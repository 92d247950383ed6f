"""The pairs that a stage trains on and validates on, and how a batch of them reads to a LLaVA."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from assistant.remote_pictures import RemotePictures
from assistant.tiles import Processor
from assistant.towers import normalised
from training.data.lesson_judge import LessonJudge
from training.data.picture_references import DOWNLOADS, PictureFinder
from training.data.preference_rows import PreferenceRows, open_preferences
from training.data.preferences import CaptionPreferences, Preference, RowPreferences, ScenePreferences
from training.data.samples import Mixture, Source, kept_aside
from training.data.sources import located, open_pictures
from training.lesson_sets import HELD_OUT_SEED, DataFolder, one_aside_in
from training.lessons import LENGTH_MULTIPLE, Lesson, pack
from training.preference_stages import PairStage
from training.recipe_parts import ConversationSource, PictureSource

Pairs = Source[Lesson]  # each is a Preference


def preference_sets(
    stage: PairStage, judge: LessonJudge, data_folder: DataFolder, samples: int
) -> tuple[Mixture[Lesson], Mixture[Lesson]]:
    """Pairs for the `samples` places of the run, and pairs to validate on: the named ones, or some kept aside.

    Raises DataError naming row and field where too many rows are bad, before anything trains.
    """
    trained: list[Pairs] = []
    aside: list[Pairs] = []
    for source in stage.mixture:
        for part, pairs in zip((trained, aside), _made(source, judge.side, data_folder), strict=True):
            part.append(pairs)
    for rows in stage.pairs:
        opened = open_rows(rows, data_folder, judge)
        kept, others = (opened, opened) if _is_held_out(stage) else opened.kept_aside(one_aside_in(len(opened)))
        trained.append(kept)
        aside.append(others)
    weights = [*(source.weight for source in stage.mixture), *(rows.weight for rows in stage.pairs)]
    shares = [weight or 1.0 for weight in weights]
    if _is_held_out(stage):
        aside = [_made(source, judge.side, data_folder)[1] for source in stage.held_out if source.scenes is not None]
        aside += [_captions(s, judge.side, data_folder) for s in stage.held_out if s.scenes is None]
        aside += [open_rows(rows, data_folder, judge) for rows in stage.held_out_pairs]
        shares = [1.0] * len(aside)
    seed = stage.schedule.seed
    return Mixture(trained, weights, samples, seed), Mixture(aside, shares, stage.held_out_samples, seed)


def _is_held_out(stage: PairStage) -> bool:
    return bool(stage.held_out or stage.held_out_pairs)


def _made(source: PictureSource, side: int, data_folder: DataFolder) -> tuple[Pairs, Pairs]:
    """Pairs that are made from `source`, to train on and to validate on."""
    if source.scenes is not None:
        first, others = (ScenePreferences(source.scenes, side, at, source.kinds) for at in (0, HELD_OUT_SEED))
        return first, others
    pictures = open_pictures(source, data_folder, side, 0)
    kept, aside = kept_aside(pictures)
    return CaptionPreferences(kept, side, kept), CaptionPreferences(aside, side, pictures)


def _captions(source: PictureSource, side: int, data_folder: DataFolder) -> Pairs:
    pictures = open_pictures(source, data_folder, side, 0)
    return CaptionPreferences(pictures, side, pictures)


def open_rows(source: ConversationSource, data_folder: DataFolder, judge: LessonJudge) -> RowPreferences:
    """The pairs of a source of rows, every row of it checked. Raises DataError naming what is wrong with which."""
    remote = RemotePictures(DOWNLOADS.expanduser()) if source.downloads else None
    rows = read_rows_of(source, data_folder)
    pictures = None if source.pictures is None else located(source.pictures, data_folder)
    opened = RowPreferences(rows, PictureFinder(rows.base, pictures, remote, source.paths), judge, source.damaged)
    opened.check()
    return opened


def read_rows_of(source: ConversationSource, data_folder: DataFolder) -> PreferenceRows:
    """The rows of a source. Raises DataError when it cannot be read."""
    place: str | Path = source.conversations if source.hub else located(source.conversations, data_folder)
    return open_preferences(place, source.split)


def pair_collator(processor: Processor, longest: int) -> Callable[[Sequence[Lesson]], dict[str, Tensor]]:
    """What makes a batch of B pairs: the better answers in the first B rows, the worse ones in the last B."""

    def collate(pairs: Sequence[Lesson]) -> dict[str, Tensor]:
        others = [pair.other() for pair in pairs if isinstance(pair, Preference)]
        if len(others) != len(pairs):
            raise TypeError("a lesson without a worse answer is no pair")
        return answer_rows([*pairs, *others], processor, longest)

    return collate


def answer_rows(lessons: Sequence[Lesson], processor: Processor, longest: int) -> dict[str, Tensor]:
    """B conversations as trl's DPOTrainer reads them, padded behind their ends.

    `input_ids`, `attention_mask` and `completion_mask` are (B, T), of which the last marks the answer and the end of
    its turn; `pixel_values` (pictures of all rows, 3, H, W). The tokens are those that instruction tuning reads, so
    special tokens that somebody typed are taken apart here too. Raises ValueError for a row of more than `longest`.
    """
    packed = [pack(lesson, processor, longest) for lesson in lessons]
    length = max(len(row.ids) for row in packed)
    length += -length % LENGTH_MULTIPLE
    batch = {
        "input_ids": torch.full((len(packed), length), processor.tokenizer.pad_token_id),
        "attention_mask": torch.zeros(len(packed), length, dtype=torch.long),
        "completion_mask": torch.zeros(len(packed), length, dtype=torch.long),
    }
    for number, row in enumerate(packed):
        size = len(row.ids)
        batch["input_ids"][number, :size] = row.ids
        batch["attention_mask"][number, :size] = 1
        batch["completion_mask"][number, :size] = row.supervised.long()
    views = [view for lesson in lessons for view in lesson.views]
    if views:
        batch["pixel_values"] = normalised(torch.stack(views), processor.image_processor)
    return batch
