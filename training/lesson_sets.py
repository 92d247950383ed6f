"""The lessons that an instruct stage trains on and validates on, mixed as its recipe says."""

from collections.abc import Callable, Sequence
from pathlib import Path

from assistant.remote_pictures import RemotePictures
from training.config import ConversationSource, InstructStage, PictureSource
from training.data.conversation_lessons import ConversationLessons
from training.data.lesson_judge import LessonJudge
from training.data.mixing import Phase, with_replay
from training.data.picture_references import DOWNLOADS, PictureFinder
from training.data.recognise import ConversationRows, recognise
from training.data.samples import KEPT_ASIDE, Mixture, SceneLessons, ShardLessons, Source, TextLessons
from training.data.scenes import EVALUATION_SEED
from training.data.sources import located
from training.data.texts import TextRow
from training.objectives.instruct import Lesson

HELD_OUT_SEED = EVALUATION_SEED + 500_000_000  # scenes that validate; evaluation uses those below
LONGEST_PROMPT_CHARACTERS = 300
ROWS_ASIDE = 16
LARGEST_SHARE_ASIDE = 5  # one in five

DataFolder = Callable[[], Path]


def lesson_sets(
    stage: InstructStage, judge: LessonJudge, data_folder: DataFolder, texts: Sequence[Sequence[TextRow]], samples: int
) -> tuple[Mixture[Lesson], Mixture[Lesson]]:
    """Lessons for the `samples` places of the run, and lessons to validate on, which are not augmented.

    `texts` are the rows of each of the stage's texts. Raises DataError when a source cannot be read, or too many of
    the rows that are tried cannot be taught.
    """
    seed = stage.schedule.seed
    talks = [open_lessons(source, data_folder, judge) for source in stage.conversations]
    others = [open_lessons(source, data_folder, judge) for source in stage.held_out_conversations]
    weights = [s.weight for s in stage.held_out] + [s.weight for s in stage.held_out_conversations]
    if not weights:
        talks, others = map(list, zip(*(talk.kept_aside(one_aside_in(len(talk))) for talk in talks), strict=True))
        weights = [source.weight or 1.0 for source in stage.conversations]
    pictured = [_lessons(source, stage, judge, data_folder, 0, True) for source in stage.mixture]
    written = [TextLessons(rows, LONGEST_PROMPT_CHARACTERS) for rows in texts]
    replayed = [_lessons(source, stage, judge, data_folder, 0, True) for source in stage.replay]
    trained: list[Source[Lesson]] = [*pictured, *written, *talks, *replayed]
    validating = [_lessons(source, stage, judge, data_folder, HELD_OUT_SEED, False) for source in stage.held_out]
    return (
        Mixture(trained, mixture_weights(stage), samples, seed),
        Mixture([*validating, *others], weights, stage.held_out_samples, seed),
    )


def one_aside_in(rows: int) -> int:
    """Of how many pictures one is kept aside where `rows` rows are taught.

    Few rows need a larger share to tell anything: some 16, but no more than a fifth, and never less than one in
    `KEPT_ASIDE`.
    """
    return max(LARGEST_SHARE_ASIDE, min(KEPT_ASIDE, rows // ROWS_ASIDE))


def mixture_weights(stage: InstructStage) -> list[float] | list[Phase]:
    """The weights of the stage's sources (pictures, texts, conversations, what is replayed), or phases of them."""
    weights = stage.weights()
    if not stage.phases and not stage.replay:
        return weights
    phases = [] if stage.phases and stage.phases[0].start == 0 else [Phase(0.0, tuple(weights))]
    phases += [Phase(phase.start, (*phase.mixture, *phase.texts, *phase.conversations)) for phase in stage.phases]
    if not stage.replay:
        return phases
    return with_replay(phases, [source.weight for source in stage.replay], stage.replay_share)


def open_lessons(source: ConversationSource, data_folder: DataFolder, judge: LessonJudge) -> ConversationLessons:
    """The lessons of a source of conversations. Raises DataError when it cannot be read."""
    remote = RemotePictures(DOWNLOADS.expanduser()) if source.downloads else None
    rows = open_conversations(source, data_folder)
    pictures = None if source.pictures is None else located(source.pictures, data_folder)
    finder = PictureFinder(rows.base, pictures, remote, source.paths)
    return ConversationLessons(rows, finder, judge, source.damaged)


def open_conversations(source: ConversationSource, data_folder: DataFolder) -> ConversationRows:
    """The rows of a source; a name on the hub where it is no path. Raises DataError when it cannot be read."""
    name = source.conversations
    if source.hub:
        return recognise(name, source.split)
    return recognise(located(name, data_folder), source.split)


def _lessons(
    source: PictureSource,
    stage: InstructStage,
    judge: LessonJudge,
    data_folder: DataFolder,
    first_scene: int,
    augment: bool,
) -> Source[Lesson]:
    if source.scenes is not None:
        drawn = source.side or judge.side
        return SceneLessons(source.scenes, judge.view_side, first_scene, source.kinds, drawn)
    return ShardLessons(data_folder(), str(source.shard), source.use, judge.view_side, stage.turns, augment)
