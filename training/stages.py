"""Build what each kind of stage trains - model, data, objective - and train it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    SiglipConfig,
    set_seed,
)

from assistant.checkpoint import load_llava
from assistant.embeddings import load_embedder
from assistant.fusion import calibrate_projector, join
from assistant.models import JOEY, find_tower, read_json
from assistant.towers import (
    ResNetShape,
    TextShape,
    ViTShape,
    clip_tokenizer,
    load_tower,
    new_image_processor,
    new_pair,
    new_tower,
    normalised,
)
from training.config import (
    InstructStage,
    LanguageStage,
    PictureSource,
    RecipeError,
    ResidualShape,
    Schedule,
    TextSource,
    TokenizerStage,
    TowerStage,
    check_settings,
    objective_module,
)
from training.data.mixing import mixture_plan
from training.data.pictures import DataError, PictureSet, read_rows
from training.data.samples import Mixture, SceneLessons, ShardLessons, Source, TextLessons, Views, kept_aside
from training.data.scenes import EVALUATION_SEED, make_scene
from training.data.sources import open_pictures, tars_of
from training.data.tar_streams import StreamedViews, TarStream
from training.data.texts import TextBlocks, TextRow, read_texts
from training.objective import Objective, Start
from training.objectives.instruct import InstructObjective, Lesson
from training.objectives.language import LanguageObjective
from training.sharding import gather_weights
from training.tokenizer import fast_tokenizer, train_sentencepiece
from training.trainer import loader_batch, train

HELD_OUT_SEED = EVALUATION_SEED + 500_000_000  # scenes that validate; evaluation uses those below
LONGEST_PROMPT_CHARACTERS = 300
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
        train_set = StreamedViews(opened_stream(stage, workshop, objective), objective.sample)
    else:
        trained, validating = trained_and_validating(stage, workshop)
        train_set = view_mixture(objective, trained, stage.mixture, samples_of(stage.schedule), seed)
    held_out = view_mixture(objective, validating, stage.held_out or stage.mixture, stage.held_out_samples, seed)
    return _train_and_export(objective, stage, workshop, train_set, held_out, stage.layer_decay)


def trained_and_validating(
    stage: TowerStage, workshop: Workshop
) -> tuple[tuple[PictureSet, ...], tuple[PictureSet, ...]]:
    """The pictures of each source, and those that validate: the named ones, or some of the sources' own kept aside."""
    trained = opened(stage.mixture, stage.side, workshop, first_scene=0)
    if stage.held_out:
        return trained, opened(stage.held_out, stage.side, workshop, HELD_OUT_SEED)
    trained, validating = zip(*(kept_aside(pictures) for pictures in trained), strict=True)
    return trained, validating


def build_tower_objective(stage: TowerStage, workshop: Workshop) -> Objective:
    """The objective of `stage` on its new or loaded tower. Raises RecipeError where the two do not fit."""
    start = _loaded_start(stage, workshop) if stage.start_from is not None else _new_start(stage, workshop)
    for model in (start.model, start.tower.model if start.tower else None):
        if model is not None and stage.attention is not None:
            model.set_attn_implementation(stage.attention)
    try:
        return objective_module(stage.objective).build(check_settings(stage.objective, stage.settings), start)
    except ValueError as error:
        raise RecipeError(f"stage {stage.name}: {error}") from error


def _new_start(stage: TowerStage, workshop: Workshop) -> Start:
    shape = stage.backbone
    if isinstance(shape, ResidualShape):
        return Start(stage.side, new_tower(ResNetShape(shape.depth, shape.image_side)))
    if shape is None:
        raise RecipeError(f"stage {stage.name} has neither a backbone nor start_from")
    vit = ViTShape(**shape.model_dump())
    if stage.text is None:
        return Start(stage.side, new_tower(vit))
    tokenizer = AutoTokenizer.from_pretrained(JOEY if stage.tokenizer is None else workshop.output(stage.tokenizer))
    if vit.family == "clip":
        tokenizer = clip_tokenizer(tokenizer, stage.text.length)
    text = TextShape(vit.width, stage.text.layers, vit.heads, stage.text.length, 2 * vit.width)
    image_processor = new_image_processor(vit.family, vit.image_side)
    return Start(stage.side, None, new_pair(vit, text, tokenizer), image_processor, tokenizer)


def _loaded_start(stage: TowerStage, workshop: Workshop) -> Start:
    source = str(stage.start_from)
    finished = workshop.runs / source / "output"
    folder = find_tower(finished if finished.is_dir() else source)
    if read_json(folder / "config.json").get("model_type") not in (CLIPConfig.model_type, SiglipConfig.model_type):
        return Start(stage.side, load_tower(folder))
    embedder = load_embedder(folder)
    return Start(stage.side, embedder.tower, embedder.model, embedder.tower.image_processor, embedder.tokenizer)


def run_language(stage: LanguageStage, workshop: Workshop) -> dict[str, float]:
    """Train a language model and export it."""
    tokenizer = AutoTokenizer.from_pretrained(workshop.output(stage.tokenizer))
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
    set_seed(stage.schedule.seed)
    if stage.start_from is not None:
        model, processor = load_llava(workshop.output(stage.start_from))
    else:
        model, processor = _join_stages(str(stage.tower), str(stage.language_model), workshop)
    if stage.attention is not None:
        model.set_attn_implementation(stage.attention)
    objective = InstructObjective(model, processor, stage.trains, stage.longest, stage.length_power, stage.rates)
    side = processor.image_processor.size["height"]
    samples = samples_of(stage.schedule)
    train_set = lesson_mixture(stage, side, workshop, samples)
    held_out = held_out_lessons(stage, side, workshop)
    if stage.start_from is None:
        views = [view for place in range(CALIBRATION_LESSONS) for view in train_set[place % len(train_set)].views]
        calibrate_projector(model, normalised(torch.stack(views), processor.image_processor))
    return _train_and_export(objective, stage, workshop, train_set, held_out)


def _join_stages(tower: str, language_model: str, workshop: Workshop) -> tuple[Any, Any]:
    folder = workshop.output(language_model)
    seeing = load_tower(workshop.output(tower))
    return join(
        seeing.model,
        LlamaForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        seeing.image_processor,
    )


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
) -> dict[str, float]:
    folder = workshop.runs / stage.name
    scores = train(objective, stage.schedule, train_set, held_out, folder, layer_decay)
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
        scenes = (make_scene(seed) for seed in range(source.scenes))
        return [TextRow("scenes", None, text) for scene in scenes for text in _scene_texts(scene)]
    rows = [row for row in shards[source.shard] if source.source in (None, row.source)]
    if not rows:
        raise DataError(f"no row of {source.shard} has source {source.source!r}")
    return rows


def _scene_texts(scene: Any) -> list[str]:
    return [*scene.captions, *(f"{question.question} {question.answer}" for question in scene.questions)]


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
    views = [Views(some, objective.sample) for some in pictures]
    return Mixture(views, [source.weight for source in sources], samples, seed)


def lesson_mixture(stage: InstructStage, side: int, workshop: Workshop, samples: int) -> Mixture[Lesson]:
    """Lessons to train on, for `samples` places."""
    lessons: list[Source[Lesson]] = [_lessons(source, stage, side, workshop, 0, True) for source in stage.mixture]
    lessons += [TextLessons(rows, LONGEST_PROMPT_CHARACTERS) for rows in text_sources(stage.texts, workshop)]
    weights = [source.weight for source in stage.mixture] + [source.weight for source in stage.texts]
    return Mixture(lessons, weights, samples, stage.schedule.seed)


def held_out_lessons(stage: InstructStage, side: int, workshop: Workshop) -> Mixture[Lesson]:
    """Lessons to validate on, not augmented."""
    lessons = [_lessons(source, stage, side, workshop, HELD_OUT_SEED, False) for source in stage.held_out]
    return Mixture(lessons, [s.weight for s in stage.held_out], stage.held_out_samples, stage.schedule.seed)


def _lessons(
    source: PictureSource, stage: InstructStage, side: int, workshop: Workshop, first_scene: int, augment: bool
) -> Source[Lesson]:
    if source.scenes is not None:
        return SceneLessons(source.scenes, side, first_scene)
    return ShardLessons(workshop.data_folder(), str(source.shard), source.use, side, stage.turns, augment)
