"""Open the pictures that a tower is measured on, and refuse those that do not go together."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from training.config import PictureSource
from training.data.catalogue import EncodedPictures, Use
from training.data.pictures import DataError
from training.data.sources import open_encoded

CAPTION_FILES = (".jsonl", ".csv")
NAMED = 5  # labels that an error names


@dataclass(frozen=True)
class PictureData:
    """Pictures that are to be measured: still encoded, with their labels or texts known."""

    name: str
    encoded: EncodedPictures
    chosen: Sequence[int]  # of them, those that have a label (or texts)
    use: Use

    def labels(self) -> list[str]:
        """The label of each chosen picture; only where `use` is labels."""
        return [str(self.encoded.catalogue.label(index)) for index in self.chosen]

    def texts(self) -> list[tuple[str, ...]]:
        """The texts of each chosen picture; only where `use` is captions."""
        return [self.encoded.catalogue.texts(index, self.use) for index in self.chosen]


def open_all(
    train: str | None, test: str | None, pairs: str | None, data_folder: Path | None
) -> dict[str, PictureData]:
    """The data that are given, by their part: train, test, pairs; named as `open_data` reads them.

    Raises DataError when they do not go together.
    """
    if train and not test:
        raise DataError("--train needs --test: what a probe has learned is measured on other pictures")
    if train and train == test:
        raise DataError(f"--train and --test are both {train}: a probe would find its own pictures again")
    if not test and not pairs:
        raise DataError(
            "nothing to measure on. Name labelled pictures with --train and --test (kNN, linear probe), with --test "
            "alone (zero-shot), or pictures with captions with --pairs (retrieval)"
        )

    def shards() -> Path:
        if data_folder is None:
            raise DataError("a name that is no folder here is a shard: give the folder of shards with --data")
        return data_folder

    given: dict[str, tuple[str | None, Use]] = {
        "train": (train, "labels"),
        "test": (test, "labels"),
        "pairs": (pairs, "captions"),
    }
    return {part: open_data(name, use, shards) for part, (name, use) in given.items() if name}


def check_labels(data: Mapping[str, PictureData], neighbours: int) -> list[str]:
    """The labels to choose among, sorted: those of the training pictures, or of the test pictures where there are none.

    Raises DataError for fewer than two labels, a label with a single training picture, fewer training pictures than
    neighbours are asked for, and a test label that training pictures do not have.
    """
    if "test" not in data:
        return []
    base = data.get("train", data["test"])
    counts = Counter(base.labels())
    if len(counts) < 2:
        raise DataError(
            f"{base.name}: every picture has the label {next(iter(counts))!r}; two labels or more are needed"
        )
    single = sorted(label for label, count in counts.items() if count == 1)
    if "train" in data and single:
        raise DataError(
            f"{base.name}: one picture only of {_some(single)}; a probe needs two of each label, one to learn from and "
            "one to choose its penalty by. Add pictures, or take these out of train and test"
        )
    if "train" in data and neighbours > counts.total():
        raise DataError(
            f"{base.name}: {neighbours} neighbours of {counts.total()} pictures; ask for fewer, --neighbours"
        )
    unknown = sorted(set(data["test"].labels()) - set(counts))
    if unknown:
        raise DataError(
            f"{data['test'].name} has labels that no training picture has: {_some(unknown)}. Spell them as in "
            f"{base.name}, or take their pictures out"
        )
    return sorted(counts)


def check_options(data: Mapping[str, PictureData], shots: Sequence[int], templates: Sequence[str]) -> None:
    """Raises DataError for templates without pictures to name, and for more shots than a label has pictures."""
    if templates and "test" not in data:
        raise DataError("--templates needs --test: labelled pictures that are to be named")
    if not shots:
        return
    if "train" not in data:
        raise DataError("--shots needs --train and --test: shots are drawn from labelled pictures")
    counts = Counter(data["train"].labels())
    label, fewest = min(counts.items(), key=lambda item: (item[1], item[0]))
    if not 1 <= min(shots) <= max(shots) <= fewest:
        raise DataError(
            f"--shots {','.join(map(str, shots))}: {data['train'].name} has {fewest} pictures of {label!r}; ask for 1 "
            f"to {fewest}, or add pictures"
        )


def read_templates(file: Path) -> tuple[str, ...]:
    """The wordings in `file`, one a line, each with `{}` where the label goes; blank lines are passed over.

    Raises DataError naming the line at fault, or a file that cannot be read or has none.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise DataError(f"--templates {file}: {reason}. Write one template a line, as: A photo of a {{}}.") from error
    for number, line in enumerate(lines, start=1):
        if line.strip() and "{}" not in line:
            raise DataError(
                f"{file}, line {number}: {line.strip()!r} has no {{}} for the label, as: A photo of a {{}}."
            )
    templates = tuple(line.strip() for line in lines if line.strip())
    if not templates:
        raise DataError(f"{file} has no template. Write one a line, with {{}} for the label, as: A photo of a {{}}.")
    return templates


def open_data(given: str, use: Use, data_folder: Callable[[], Path]) -> PictureData:
    """The pictures of `given` that have what `use` says.

    `given` is a folder whose sub-folders are labels, a caption file (.jsonl, .csv), a tar, or else a shard of the data
    folder, which is asked for only then. Raises DataError when there is nothing to measure.
    """
    path = Path(given).expanduser()
    absolute = str(path.absolute())
    if path.is_dir():
        source = PictureSource(folder=absolute, weight=1)
    elif path.suffix.lower() in CAPTION_FILES:
        source = PictureSource(captions=absolute, weight=1)
    elif path.suffix.lower() == ".tar":
        source = PictureSource(tars=absolute, weight=1)
    elif path.name != given:
        raise DataError(f"there is no folder {given}; name a folder of pictures, a caption file, or a shard")
    else:
        source = PictureSource(shard=given, weight=1)
    name, encoded = open_encoded(source, data_folder)
    chosen = encoded.catalogue.having(use)
    if not len(chosen):
        way_out = "put them into sub-folders named after their labels" if use == "labels" else "name data with captions"
        raise DataError(f"{name}: none of the {len(encoded.catalogue)} pictures has {use}; {way_out}")
    return PictureData(name, encoded, [int(index) for index in chosen], use)


def _some(labels: list[str]) -> str:
    return ", ".join(map(repr, labels[:NAMED])) + (f" and {len(labels) - NAMED} more" if len(labels) > NAMED else "")
