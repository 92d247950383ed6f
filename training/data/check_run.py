"""Check one or two files of conversations as a person asks for it: progress, tables, page, and the good rows."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from assistant.remote_pictures import RemotePictures
from training.data.check_page import Section, write_page
from training.data.check_report import report_of
from training.data.check_samples import shown_samples
from training.data.check_terminal import check_summary, notes, sample_panel
from training.data.data_check import Check, check_data, shared_pictures
from training.data.fixed_rows import refused_file, write_fixed
from training.data.lesson_judge import LessonJudge, judge_for
from training.data.picture_references import DOWNLOADS, PictureFinder
from training.data.recognise import ConversationRows, recognise

ON_THE_PAGE = 12  # rows that the page shows


@dataclass(frozen=True)
class Wanted:
    """What is checked, for which model, and what is written."""

    sources: Sequence[Path | str]  # the data, and where there is one the held-out data
    model: str | None = None
    pictures: Path | None = None
    split: str = "train"
    longest: int | None = None
    downloads: bool = False
    strict: bool = False
    show: int = 3
    page: Path | None = None
    fixed: Path | None = None
    paths: bool = True
    as_json: bool = False


def run_check(wanted: Wanted, console: Console) -> bool:
    """Check what is wanted and say what was found; gives whether training would stop.

    Raises ModelError for a model that cannot be had, and DataError for data that is not recognised.
    """
    judge, name = judge_for(wanted.model, wanted.longest)
    remote = RemotePictures(DOWNLOADS.expanduser()) if wanted.downloads else None
    opened = [recognise(source, wanted.split) for source in wanted.sources]
    finders = [PictureFinder(rows.base, wanted.pictures, remote, wanted.paths) for rows in opened]
    checks = [_checked(rows, finder, judge) for rows, finder in zip(opened, finders, strict=True)]
    for held_out in checks[1:]:
        held_out.findings += shared_pictures(checks[0], held_out)
    if wanted.as_json:
        print(json.dumps(report_of(checks, name, wanted.strict)))
    else:
        console.print(f"Checked for the model {name}.", style="dim", markup=False)
        for check, rows in zip(checks, opened, strict=True):
            _say(console, check, rows, judge, wanted)
    if wanted.page is not None:
        sections = [
            Section(check, shown_samples(check, rows, judge, ON_THE_PAGE), finder)
            for check, rows, finder in zip(checks, opened, finders, strict=True)
        ]
        write_page(wanted.page, sections, name, wanted.strict)
        console.print(f"The report is in {wanted.page}", markup=False, soft_wrap=True)
    if wanted.fixed is not None:
        _fix(console, wanted.fixed, checks[0], opened[0], finders[0])
    return any(check.stops(wanted.strict) for check in checks)


def _checked(rows: ConversationRows, finder: PictureFinder, judge: LessonJudge) -> Check:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("checking rows", total=len(rows))
        return check_data(rows, finder, judge, lambda done: progress.update(task, completed=done))


def _say(console: Console, check: Check, rows: ConversationRows, judge: LessonJudge, wanted: Wanted) -> None:
    for shown in shown_samples(check, rows, judge, wanted.show):
        console.print(sample_panel(shown))
    console.print(check_summary(check, wanted.strict))
    for note in notes(check):
        console.print(note, style="bold yellow")


def _fix(console: Console, out: Path, check: Check, rows: ConversationRows, finder: PictureFinder) -> None:
    good, refused = write_fixed(out, check, rows, finder)
    said = f"{good:,} rows are in {out}"
    if refused:
        said += f"; {refused:,} were left out, they are in {refused_file(out)} with what is wrong"
    console.print(said, markup=False, soft_wrap=True)
