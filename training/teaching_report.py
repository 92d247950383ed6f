"""Compare a taught model with what it was made from, on the new task and on what it knew, and write it down."""

import gc
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
from accelerate import PartialState
from rich.console import Console

from assistant.adapter_files import ADAPTER
from assistant.answering import Assistant
from assistant.hashing import file_hash
from assistant.models import JOEY, read_json
from training.callbacks import CURVES
from training.config import InstructStage, Recipe, RecipeError
from training.evaluation.answers import accuracy, accuracy_by_kind, normalised
from training.evaluation.scores import wilson_interval
from training.recipe import DONE, data_hashes
from training.stages import Workshop
from training.teaching_card import Change, Made, Sample, Share, TeachingReport, card_of, report_table, write_card
from training.teaching_questions import Answers, Examination, answers_of, examination_of

REPORT = "report.json"
SAMPLES = 10
TOLERATED = 0.02  # a fall of what it knew, and a rise of hallucination, that nothing is said about
FEW = 20  # held-out questions


def report_teaching(recipe: Recipe, runs: Path, console: Console) -> TeachingReport | None:
    """Ask the models before and after, print the table, and write card, numbers and curves into the model's folder.

    On the main process alone; None on others. Raises RecipeError where `recipe` taught nothing to a model that was
    there before, DataError where its data cannot be read any more, and ModelError where a model is damaged.
    """
    stage = recipe.stages[0]
    if len(recipe.stages) != 1 or not isinstance(stage, InstructStage) or stage.start_from is None:
        raise RecipeError(f"{recipe.name}: only a recipe of one instruct stage with start_from has a before and after")
    if not PartialState().is_main_process:
        return None
    workshop = Workshop(runs / recipe.name, None)
    model = workshop.runs / "model"
    after = _loaded(model)
    asked = examination_of(stage, workshop, after.processor)
    answered_after = answers_of(after, asked, stage.longest, "after")
    del after
    gc.collect()  # a large model has to be gone before the next one comes
    before = _loaded(workshop.named(stage.start_from))
    answered_before = answers_of(before, asked, stage.longest, "before")
    report = compared(made_of(recipe, stage, workshop), stage, asked, answered_before, answered_after)
    written = write_report(report, workshop.runs / stage.name / CURVES, model)
    tell_report(report, written, console)
    return report


def _loaded(model: str | Path) -> Assistant:
    """As `kangaroo ask` has it; on a GPU that knows bfloat16 in that, so that what was trained there fits again."""
    narrow = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return Assistant.load(model, torch.bfloat16 if narrow else torch.float32)


def compared(made: Made, stage: InstructStage, asked: Examination, before: Answers, after: Answers) -> TeachingReport:
    """The shares of right answers (as `training.evaluation.answers` judges) of both, and what got worse."""
    right = [one.answer for one in asked.held_out]
    kinds = [one.question.kind for one in asked.known]
    truths = [one.question.answer for one in asked.known]
    by_kind = [accuracy_by_kind(kinds, answers.known, truths) for answers in (before, after)]
    known = _change("generated scenes, which a model such as Joey knew", before.known, after.known, truths)
    imagined = Change(
        "said yes to what is not in the scene, lower is better",
        len(asked.absent),
        *(_share(said_yes(answers.absent), len(asked.absent)) for answers in (before, after)),
    )
    return TeachingReport(
        made=made,
        new=_change("your data, rows kept aside", before.held_out, after.held_out, right),
        loss_before=before.loss,
        loss_after=after.loss,
        known=known,
        kinds=tuple(
            Change(f"of these: {kind}", score.questions, *(_share(s[kind].right, score.questions) for s in by_kind))
            for kind, score in by_kind[0].items()
        ),
        hallucination=imagined,
        samples=tuple(
            Sample(one.question, one.answer, was, now)
            for one, was, now in zip(asked.held_out[:SAMPLES], before.held_out, after.held_out, strict=False)
        ),
        remarks=tuple(_remarks(asked)),
        warnings=tuple(_warnings(known, imagined, stage)),
    )


def said_yes(answers: Sequence[str]) -> float:
    """The share of `answers` that begin with yes. Raises ValueError when there are none."""
    if not answers:
        raise ValueError("no answers: there is no share of them that says yes")
    return sum(normalised(answer).split()[:1] == ["yes"] for answer in answers) / len(answers)


def _change(what: str, before: Sequence[str], after: Sequence[str], right: Sequence[str]) -> Change:
    if not right:
        return Change(what, 0, None, None)
    shares = (_share(accuracy(answers, right).right, len(right)) for answers in (before, after))
    return Change(what, len(right), *shares)


def _share(share: float, count: int) -> Share:
    return Share(share, *wilson_interval(share, count))


def _remarks(asked: Examination) -> list[str]:
    count = len(asked.held_out)
    if not count:
        return ["No row of your data was kept aside, so nothing is known of questions that it did not train on."]
    remarks = ["Of each row that was kept aside the first learned answer is asked for, behind the turns before it."]
    remarks.append("An answer is right where it equals the expected one, but for case, punctuation and articles.")
    if count < FEW:
        remarks.append(f"Only {count} rows were kept aside, so the intervals are wide.")
    return remarks


def _warnings(known: Change, imagined: Change, stage: InstructStage) -> list[str]:
    ways = [] if "language" not in stage.trains else ["a larger --replay" if stage.replay else "--replay 0.2"]
    way_out = ", ".join([*ways, "fewer epochs (--epochs)"]) + " or a lower rate (--rate)"
    warnings = []
    if known.before is not None and known.after is not None and known.after.share < known.before.share - TOLERATED:
        warnings.append(
            f"It forgot: of {known.questions} questions about generated scenes it answers {known.after.share:.0%} "
            f"right, and {known.before.share:.0%} before. Try {way_out}."
        )
    was, now = imagined.before, imagined.after
    if was is not None and now is not None and now.share > was.share + TOLERATED:
        warnings.append(
            f"It imagines more: asked {imagined.questions} times about something that is not in the scene, it says yes "
            f"to {now.share:.0%}, and to {was.share:.0%} before. Try {way_out}, or add questions whose answer is no."
        )
    return warnings


def made_of(recipe: Recipe, stage: InstructStage, workshop: Workshop) -> Made:
    """What the finished `stage` of `recipe` made its model from."""
    marker = workshop.runs / stage.name / DONE
    done, schedule, start = read_json(marker), stage.schedule, str(stage.start_from)
    base = "Joey" if start == str(JOEY.absolute()) else Path(start).name if Path(start).is_dir() else start
    lora = "" if stage.lora is None else f", LoRA of rank {stage.lora.rank}" + (" on 4 bits" * stage.four_bits)
    replay = f", {stage.replay_share:.0%} of the lessons generated scenes" if stage.replay else ""
    how = (
        ("trained", f"{' and '.join(stage.trains)}{lora}"),
        ("steps", f"{schedule.steps} of {schedule.batch_size * schedule.accumulation} lessons{replay}"),
        ("highest learning rate", f"{schedule.learning_rate:g}"),
        ("finished", datetime.fromtimestamp(marker.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M UTC")),
        ("seconds", str(done["seconds"])),
    )
    adapter = workshop.runs / "model" / ADAPTER
    return Made(recipe.name, base, how, tuple(_data(recipe, stage, workshop)), adapter.is_dir())


def _data(recipe: Recipe, stage: InstructStage, workshop: Workshop) -> list[tuple[str, str]]:
    stamps = data_hashes(recipe, workshop)
    told = []
    for source in stage.conversations:
        file = Path(source.conversations)
        stamp = stamps[f"conversations {source.conversations}"] + " (of its state)"
        told.append((file.name, file_hash(file)) if file.is_file() else (source.conversations, stamp))
    return told


def write_report(report: TeachingReport, curves: Path, model: Path) -> Path:
    """Write report.json, the picture of the curves and the card into `model`, and give the card's file."""
    (model / REPORT).write_text(json.dumps(asdict(report), indent=2) + "\n")
    if curves.is_file():
        shutil.copyfile(curves, model / CURVES)
    return write_card(model, card_of(report, CURVES if curves.is_file() else None))


def tell_report(report: TeachingReport, card: Path, console: Console) -> None:
    """Print the table, what to know about it, and where the card is."""
    console.print(report_table(report))
    for line in (*report.remarks, *report.warnings):
        console.print(line, markup=False, highlight=False)
    console.print(f"The card is {card}", soft_wrap=True, markup=False, highlight=False)
