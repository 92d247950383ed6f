"""Build what each kind of stage trains - model, data, objective - and train it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    SiglipConfig,
    set_seed,
)

from assistant.embeddings import load_embedder
from assistant.fusion import calibrate_projector
from assistant.models import JOEY, find_tower, read_json
from assistant.tiles import cut
from assistant.towers import (
    load_tower,
    normalised,
)
from training.arguments import loader_batch
from training.config import (
    InstructStage,
    LanguageStage,
    PictureSource,
    RecipeError,
    Schedule,
    TextSource,
    TokenizerStage,
    TowerStage,
)
from training.data.length_order import LongestFirst
from training.data.lesson_judge import LessonJudge
from training.data.mixing import mixture_plan
from training.data.pictures import DataError, PictureSet, read_rows
from training.data.samples import Mixture, Views, kept_aside
from training.data.scenes import words_of_scene
from training.data.sources import open_pictures, tars_of
from training.data.tar_streams import StreamedViews, TarStream
from training.data.texts import TextBlocks, TextRow, read_texts
from training.instruct_start import build_instruct_objective, packs
from training.lesson_sets import HELD_OUT_SEED, lesson_sets
from training.monitors import TowerMonitor
from training.objective import Objective, Start
from training.objectives.instruct import InstructObjective, Lesson
from training.objectives.language import LanguageObjective
from training.sample_names import NamesSamples
from training.sharding import gather_weights
from training.tokenizer import fast_tokenizer, train_sentencepiece
from training.tower_start import new_start, objective_on
from training.trainer import train

CALIBRATION_LESSONS = 48  # pictures whose features set the scale of a new projector


@dataclass(frozen=True)
class Workshop:
    """Where a recipe runs: its folder of stages and the data folder (None when the recipe generates all it needs)."""

    runs: Path
    data: Path | None

    def output(self, stage_or_folder: str) -> Path:
        """What the stage called `stage_or_folder` exported, or the folder of that path."""
        for folder in (self.runs / stage_or_folder / "output", Path(stage_or_folder)):
            if folder.is_dir():
                return folder
        raise RecipeError(f"{stage_or_folder} is neither a finished stage of {self.runs} nor a folder")

    def named(self, stage_folder_or_hub_name: str) -> str | Path:
        """What the stage of that name exported, where there is one; else the name itself, of a folder or on the hub."""
        finished = self.runs / stage_folder_or_hub_name / "output"
        return finished if finished.is_dir() else stage_folder_or_hub_name

    def tokenizer(self, name: str | None) -> PreTrainedTokenizerFast:
        """The one that the stage or folder `name` holds; Joey's where None."""
        return AutoTokenizer.from_pretrained(JOEY if name is None else self.output(name))

    def data_folder(self) -> Path:
        """The data folder. Raises DataError when none was given."""
        if self.data is None:
            raise DataError(
                "this recipe reads shards: give their folder with --data or KANGAROO_DATA, "
                "or run the recipe 'scenes', which needs no data"
            )
        if not self.data.is_dir():
            raise DataError(f"the data folder {self.data} is not a folder")
        return self.data


def run_tokenizer(stage: TokenizerStage, workshop: Workshop) -> dict[str, float]:
    """Train and export the tokenizer."""
    sources = text_sources(stage.texts, workshop, stage.exclude_captions_of)
    source, index = mixture_plan([len(s) for s in sources], [t.weight for t in stage.texts], stage.documents, seed=1)
    texts = (sources[s][i].text[:2000] for s, i in zip(source, index, strict=True))
    folder = workshop.runs / stage.name
    train_sentencepiece(texts, stage.vocabulary, folder / "tokenizer.model")
    tokenizer = fast_tokenizer(folder / "tokenizer.model", stage.longest)
    tokenizer.save_pretrained(folder / "output")
    return {"vocabulary": float(len(tokenizer))}


def run_tower(stage: TowerStage, workshop: Workshop) -> dict[str, float]:
    """Pretrain a tower and export it."""
    set_seed(stage.schedule.seed)
    objective = build_tower_objective(stage, workshop)
    seed = stage.schedule.seed
    train_set: StreamedViews | Mixture[Any]
    if stage.mixture[0].stream:
        validating = opened(stage.held_out, stage.side, workshop, HELD_OUT_SEED)
        train_set = StreamedViews(opened_stream(stage, workshop, objective), NamesSamples(objective.sample))
    else:
        trained, validating = trained_and_validating(stage, workshop)
        train_set = view_mixture(objective, trained, stage.mixture, samples_of(stage.schedule), seed)
    held_out = view_mixture(objective, validating, stage.held_out or stage.mixture, stage.held_out_samples, seed)
    monitor = opened_monitor(stage, validating, workshop)
    return _train_and_export(objective, stage, workshop, train_set, held_out, stage.layer_decay, monitor)


def trained_and_validating(
    stage: TowerStage, workshop: Workshop
) -> tuple[tuple[PictureSet, ...], tuple[PictureSet, ...]]:
    """The pictures of each source, and those that validate: the named ones, or some of the sources' own kept aside."""
    trained = opened(stage.mixture, stage.side, workshop, first_scene=0)
    if stage.held_out:
        return trained, opened(stage.held_out, stage.side, workshop, HELD_OUT_SEED)
    trained, validating = zip(*(kept_aside(pictures) for pictures in trained), strict=True)
    return trained, validating


def opened_monitor(stage: TowerStage, validating: Sequence[PictureSet], workshop: Workshop) -> TowerMonitor | None:
    """What looks at the tower of `stage` while it trains: on `validating`, and on what its `monitor` names."""
    wanted = stage.monitor
    if wanted is None:
        return None
    named = [
        None if source is None else opened((source,), stage.side, workshop, HELD_OUT_SEED)[0]
        for source in (wanted.labelled, wanted.pairs)
    ]
    return TowerMonitor(wanted, stage.side, stage.schedule.batch_size, validating, *named)


def build_tower_objective(stage: TowerStage, workshop: Workshop) -> Objective:
    """The objective of `stage` on its new or loaded tower. Raises RecipeError where the two do not fit."""
    if stage.start_from is not None:
        return objective_on(stage, _loaded_start(stage, workshop))
    return objective_on(stage, new_start(stage, stage.side, workshop.tokenizer))


def _loaded_start(stage: TowerStage, workshop: Workshop) -> Start:
    source = str(stage.start_from)
    finished = workshop.runs / source / "output"
    folder = find_tower(finished if finished.is_dir() else source)
    if read_json(folder / "config.json").get("model_type") not in (CLIPConfig.model_type, SiglipConfig.model_type):
        return Start(stage.side, load_tower(folder), tokenizer=workshop.tokenizer(stage.tokenizer))
    embedder = load_embedder(folder)
    return Start(stage.side, embedder.tower, embedder.model, embedder.tower.image_processor, embedder.tokenizer)


def run_language(stage: LanguageStage, workshop: Workshop) -> dict[str, float]:
    """Train a language model and export it."""
    tokenizer = workshop.tokenizer(stage.tokenizer)
    set_seed(stage.schedule.seed)
    objective = LanguageObjective(new_language_model(stage, tokenizer), tokenizer)
    sources = text_sources(stage.texts, workshop, stage.exclude_captions_of)
    weights = [text.weight for text in stage.texts]
    count = samples_of(stage.schedule)
    # Held-out documents are split off first: a block that shares a text with a trained one would flatter the score.
    # At most 3 % of any source is held out.
    kept = [rows[: max(1, len(rows) - max(1, len(rows) // 32))] for rows in sources]
    others = [rows[len(k) :] or rows for rows, k in zip(sources, kept, strict=True)]
    train_set = TextBlocks(kept, weights, tokenizer, stage.block, count, stage.schedule.seed)
    held_out = TextBlocks(others, weights, tokenizer, stage.block, stage.held_out_blocks, stage.schedule.seed)
    return _train_and_export(objective, stage, workshop, train_set, held_out)


def run_instruct(stage: InstructStage, workshop: Workshop) -> dict[str, float]:
    """Join a LLaVA or go on with one, train the named parts, and export it."""
    objective, train_set, held_out = prepared_lessons(stage, workshop)
    return _train_and_export(objective, stage, workshop, train_set, held_out)


def prepared_lessons(
    stage: InstructStage, workshop: Workshop
) -> tuple[InstructObjective, Mixture[Lesson] | LongestFirst[Lesson], Mixture[Lesson]]:
    """What trains, what it trains on, and what it is validated on. Raises RecipeError or DataError."""
    set_seed(stage.schedule.seed)
    objective = build_instruct_objective(stage, workshop.named)
    processor = objective.processor
    judge, texts = LessonJudge(processor, stage.longest), text_sources(stage.texts, workshop)
    train_set, held_out = lesson_sets(stage, judge, workshop.data_folder, texts, samples_of(stage.schedule))
    if stage.start_from is None:
        pictures = [view for place in range(CALIBRATION_LESSONS) for view in train_set[place % len(train_set)].views]
        views, _ = cut(processor, pictures)
        calibrate_projector(objective.model, normalised(views, processor.image_processor))
    step = samples_of(stage.schedule) // stage.schedule.steps
    if packs(stage) or step == stage.schedule.batch_size:  # no padding, or one micro-batch, whatever the order
        return objective, train_set, held_out
    return objective, LongestFirst(train_set, step, judge.per_picture), held_out


def samples_of(schedule: Schedule) -> int:
    """How many samples a run sees, over all its processes."""
    return schedule.steps * schedule.batch_size * schedule.accumulation * PartialState().num_processes


def _train_and_export(
    objective: Objective,
    stage: TowerStage | LanguageStage | InstructStage,
    workshop: Workshop,
    train_set: Any,
    held_out: Any,
    layer_decay: float = 1.0,
    monitor: TowerMonitor | None = None,
) -> dict[str, float]:
    folder = workshop.runs / stage.name
    scores = train(objective, stage.schedule, train_set, held_out, folder, layer_decay, monitor)
    state = PartialState()
    gather_weights(objective)
    if state.is_main_process:
        objective.export(folder / "output")
    state.wait_for_everyone()
    return scores


def new_language_model(stage: LanguageStage, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A Llama of the stage's shape with new weights and one matrix for input and output words."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=stage.width,
            intermediate_size=stage.feed_forward,
            num_hidden_layers=stage.layers,
            num_attention_heads=stage.heads,
            num_key_value_heads=stage.heads,
            max_position_embeddings=stage.longest,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def text_sources(
    sources: Sequence[TextSource], workshop: Workshop, exclude_captions_of: Sequence[str] = ()
) -> list[list[TextRow]]:
    """The rows of each source, without the captions of the shards named in `exclude_captions_of`."""
    excluded = {
        c for shard in exclude_captions_of for row in read_rows(workshop.data_folder(), shard) for c in row.captions
    }
    shards: dict[str | None, list[TextRow]] = {
        s.shard: read_texts(workshop.data_folder(), s.shard, excluded) for s in sources if s.shard
    }
    return [_text_rows(source, shards) for source in sources]


def _text_rows(source: TextSource, shards: dict[str | None, list[TextRow]]) -> list[TextRow]:
    if source.scenes is not None:
        texts = (text for seed in range(source.scenes) for text in _scene_texts(seed))
        return [TextRow("scenes", None, text) for text in texts]
    rows = [row for row in shards[source.shard] if source.source in (None, row.source)]
    if not rows:
        raise DataError(f"no row of {source.shard} has source {source.source!r}")
    return rows


def _scene_texts(seed: int) -> list[str]:
    captions, questions = words_of_scene(seed)
    return [*captions, *(f"{question.question} {question.answer}" for question in questions)]


def opened(sources: Sequence[PictureSource], side: int, workshop: Workshop, first_scene: int) -> tuple[PictureSet, ...]:
    """The pictures of each source."""
    return tuple(open_pictures(source, workshop.data_folder, side, first_scene) for source in sources)


def opened_stream(stage: TowerStage, workshop: Workshop, objective: Objective) -> TarStream:
    """The only source of `stage`, without end, this rank's share of it."""
    source, state = stage.mixture[0], PartialState()
    return TarStream(
        tars_of(source, workshop.data_folder),
        source.use,
        stage.side,
        stage.schedule.seed,
        damaged=source.damaged,
        rank=state.process_index,
        ranks=state.num_processes,
        batch_size=loader_batch(stage.schedule, objective),
    )


def view_mixture(
    objective: Objective, pictures: Sequence[PictureSet], sources: Sequence[PictureSource], samples: int, seed: int
) -> Mixture[Any]:
    """What `objective` makes of `pictures`, a set for each of `sources`, for `samples` places."""
    views = [Views(some, NamesSamples(objective.sample)) for some in pictures]
    return Mixture(views, [source.weight for source in sources], samples, seed)
