"""The two commands of a job, `kangaroo data check` and `kangaroo tune`, and what they leave behind to be read."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.jobs.records import JobRecord

STAGE = "lora"  # the stage that `kangaroo tune` runs where nobody asks for another
ROWS_TOLD = 3


@dataclass(frozen=True)
class JobFolder:
    """Where the files of one job lie while it is on its way."""

    folder: Path

    @property
    def report(self) -> Path:
        """What the check of its data says."""
        return self.folder / "check.json"

    @property
    def log(self) -> Path:
        """Standard error of its commands."""
        return self.folder / "log.txt"

    @property
    def said(self) -> Path:
        """Standard output of its training."""
        return self.folder / "said.txt"

    @property
    def out(self) -> Path:
        """Where `kangaroo tune` keeps checkpoints and puts the model."""
        return self.folder / "tune"

    @property
    def steps(self) -> Path:
        """A line for each noted step."""
        return self.out / STAGE / "log.jsonl"

    @property
    def adapter(self) -> Path:
        """What training leaves at its end."""
        return self.out / "model" / "adapter"

    def bytes(self) -> int:
        """What it takes on the disk."""
        return sum(status.st_size for file in self.folder.rglob("*") if (status := _status(file)) is not None)


def _status(file: Path) -> Any:
    """None for a file that went away since it was listed."""
    try:
        return file.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None


def check_arguments(record: JobRecord, model: Path) -> list[str]:
    """`kangaroo data check` of the job's files, which lie in the folder that it runs in."""
    files = [file for file in (record.job.training_file, record.job.validation_file) if file is not None]
    return ["data", "check", *files, "--model", str(model), "--no-paths", "--strict", "--json"]


def tune_arguments(record: JobRecord, model: Path, files: Path, folder: JobFolder) -> list[str]:
    """`kangaroo tune` of `model` on the job's files, which lie in `files`; called again, it goes on."""
    job, how = record.job, record.job.hyperparameters
    arguments = ["tune", str(model), "--data", str(files / job.training_file), "--out", str(folder.out)]
    # Every row of a training file is trained on: what validates comes in a file of its own, or is not told at all.
    arguments += ["--held-out", str(files / (job.validation_file or job.training_file))]
    arguments += ["--steps", str(record.steps), "--batch", str(how.batch_size), "--seed", str(job.seed)]
    arguments += ["--rate-times", str(how.learning_rate_multiplier)]
    return [*arguments, "--no-paths", "--no-rehearsal", "--no-report"]


@dataclass(frozen=True)
class Fault:
    """What is wrong with a job's data: in which of its two files, and in words that name the row."""

    param: str
    message: str


def faults_in(report: list[dict[str, Any]]) -> list[Fault]:
    """What refuses rows, by file."""
    return [
        Fault(param, "; ".join(told) + (f"; and {more} more" if more > 0 else "") + ".")
        for param, source in zip(("training_file", "validation_file"), report, strict=False)
        if (told := [_in_words(found) for found in source["findings"] if found["refuses"]][:ROWS_TOLD])
        for more in [sum(found["refuses"] for found in source["findings"]) - len(told)]
    ]


def warnings_in(report: list[dict[str, Any]]) -> list[str]:
    """What is told and taught all the same: the first of each kind."""
    first: dict[str, str] = {}
    for found in (each for source in report for each in source["findings"] if not each["refuses"]):
        first.setdefault(found["kind"], f"{found['kind']}: {_in_words(found)}")
    return list(first.values())


def _in_words(found: dict[str, Any]) -> str:
    return f"{found['place']}, {found['field']}: {found['wrong']} ({found['way_out']})"


def read_report(file: Path) -> list[dict[str, Any]] | None:
    """What `kangaroo data check` found in each file; None where it did not come so far."""
    try:
        return list(json.loads(file.read_bytes())["sources"])
    except (FileNotFoundError, ValueError):
        return None
