"""Measure a tower with everything that fits it and the data given, and say it as a table and as JSON."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from assistant.embeddings import Embedder, has_text_half, load_embedder
from assistant.hashing import file_hash
from assistant.models import ModelError, find_tower
from assistant.naming import TEMPLATES, label_embeddings
from assistant.towers import Tower, load_tower
from training.evaluation.features import Features, compute_features
from training.evaluation.picture_data import PictureData, check_labels, open_all
from training.evaluation.probes import NEIGHBOURS, knn_labels, linear_probe
from training.evaluation.scores import Score, score_labels, score_of
from training.evaluation.zero_shot import (
    chance_recall,
    ranks,
    recall,
    who_says_what,
    zero_shot_labels,
)

FeatureKind = Literal["pooled", "patches", "both"]
RECALLS = (1, 5, 10)
PACKAGES = ("torch", "transformers", "scikit-learn")


@dataclass(frozen=True)
class Wanted:
    """What to measure on what. Data are named as `training.evaluation.picture_data.open_data` reads them."""

    train: str | None = None  # labelled pictures that probes learn from
    test: str | None = None  # labelled pictures that are to be named
    pairs: str | None = None  # pictures with texts, to find one by the other
    features: FeatureKind = "pooled"
    neighbours: int = NEIGHBOURS
    batch: int = 64
    bf16: bool = False


@dataclass(frozen=True)
class Measured:
    """One number: what was measured on which features, its score, and how it came about."""

    measure: str
    features: str
    score: Score
    details: Mapping[str, Any]


def measure_tower(source: str | Path, wanted: Wanted, data_folder: Path | None) -> dict[str, Any]:
    """Everything that fits, ready for JSON: kNN and linear probe, and with a text half zero-shot and retrieval.

    Raises:
        ModelError: the tower cannot be loaded, or lacks the text half or the patches that are wanted.
        DataError: data that are missing, damaged or do not fit together.
    """
    started = time.perf_counter()
    data = open_all(wanted.train, wanted.test, wanted.pairs, data_folder)
    labels = check_labels(data, wanted.neighbours)
    folder = find_tower(source)
    tower, embedder = _load(folder, wanted)
    _check_features(tower, wanted.features)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (embedder.model if embedder else tower).to(device)
    features = {
        part: compute_features(tower, embedder, pictures, wanted.batch, device, wanted.bf16)
        for part, pictures in data.items()
    }
    scores = [
        {"measure": m.measure, "features": m.features, **asdict(m.score), **m.details}
        for m in _measured(embedder, data, features, labels, wanted)
    ]
    return {
        "tower": _said_of_tower(source, folder, tower, embedder),
        "data": {part: _said_of_data(data[part], features[part]) for part in data},
        "settings": asdict(wanted) | {"templates": list(TEMPLATES)},
        "scores": scores,
        "versions": {package: version(package) for package in PACKAGES},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "seconds": round(time.perf_counter() - started, 2),
    }


def report_table(report: Mapping[str, Any]) -> Table:
    """The scores of `measure_tower`, in percent, one row each; it fits into 80 columns."""
    title = f"{report['tower']['source']} ({report['tower']['kind']}), in percent"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("measure", no_wrap=True)
    table.add_column("features", no_wrap=True)
    for column in ("right", "interval", "chance", "constant", "pictures"):
        table.add_column(column, justify="right", no_wrap=True)
    for score in report["scores"]:
        table.add_row(
            score["measure"] + ("" if score.get("converged", True) else " (not converged)"),
            score["features"],
            _percent(score["right"]),
            f"{_percent(score['low'])} - {_percent(score['high'])}",
            _percent(score["chance"]),
            "-" if score["majority"] is None else _percent(score["majority"]),
            str(score["pictures"]),
        )
    return table


def _load(folder: Path, wanted: Wanted) -> tuple[Tower, Embedder | None]:
    """The tower, and the embedder that it is a part of where it has a text half."""
    if has_text_half(folder):
        embedder = load_embedder(folder)
        return embedder.tower, embedder
    if wanted.pairs or not wanted.train:
        raise ModelError(
            f"the tower in {folder} has no text half, which zero-shot and retrieval need: measure it with --train and "
            "--test, or take a CLIP or SigLIP with both halves"
        )
    return load_tower(folder).eval(), None


def _said_of_tower(source: str | Path, folder: Path, tower: Tower, embedder: Embedder | None) -> dict[str, Any]:
    return {
        "source": str(source),
        "kind": tower.model.config.model_type,
        "text_half": embedder is not None,
        "sha256": {file.name: file_hash(file) for file in sorted(folder.glob("*.safetensors"))},
    }


def _check_features(tower: Tower, kind: FeatureKind) -> None:
    if kind != "pooled" and not tower.has_patch_tokens:
        family = tower.model.config.model_type
        raise ModelError(f"a {family} has no patch tokens, and pools over its whole grid: take --features pooled")


def _chosen_features(features: Features, kind: FeatureKind) -> Iterator[tuple[str, Tensor]]:
    if kind in ("pooled", "both"):
        yield "pooled", features.pooled
    if kind in ("patches", "both"):
        yield "patches", features.patches


def _measured(
    embedder: Embedder | None,
    data: Mapping[str, PictureData],
    features: Mapping[str, Features],
    labels: list[str],
    wanted: Wanted,
) -> Iterator[Measured]:
    """Everything that the data and the tower allow."""
    if "train" in data:
        yield from _probes(data, features, labels, wanted)
    if "test" in data and embedder:
        yield _zero_shot(embedder, data["test"], features["test"], labels)
    if "pairs" in data and embedder:
        yield from _retrieval(embedder, data["pairs"], features["pairs"])


def _probes(
    data: Mapping[str, PictureData], features: Mapping[str, Features], labels: list[str], wanted: Wanted
) -> Iterator[Measured]:
    """kNN and linear probe on each kind of features."""
    place = {label: number for number, label in enumerate(labels)}
    train_labels = torch.tensor([place[label] for label in data["train"].labels()])
    expected = [place[label] for label in data["test"].labels()]
    for (name, train), (_, test) in zip(
        _chosen_features(features["train"], wanted.features),
        _chosen_features(features["test"], wanted.features),
        strict=True,
    ):
        found = knn_labels(train, train_labels, test, wanted.neighbours).tolist()
        yield Measured("kNN", name, score_labels(found, expected, len(labels)), {"neighbours": wanted.neighbours})
        probe = linear_probe(train, train_labels, test)
        details = {key: value for key, value in vars(probe).items() if key != "labels"}
        yield Measured("linear probe", name, score_labels(probe.labels.tolist(), expected, len(labels)), details)


def _zero_shot(embedder: Embedder, data: PictureData, features: Features, labels: list[str]) -> Measured:
    assert features.embeddings is not None
    named = zero_shot_labels(features.embeddings, label_embeddings(embedder.texts, labels).cpu()).tolist()
    score = score_labels([labels[number] for number in named], data.labels(), len(labels))
    return Measured("zero-shot", "shared", score, {})


def _retrieval(embedder: Embedder, data: PictureData, features: Features) -> Iterator[Measured]:
    """Recall at 1, 5 and 10, from pictures to texts and back."""
    assert features.embeddings is not None
    said, right = who_says_what(data.texts())
    texts = embedder.texts(said).cpu()
    directions = {
        "picture to text": (features.embeddings, texts, right),
        "text to picture": (texts, features.embeddings, right.T),
    }
    for direction, (queries, candidates, true) in directions.items():
        found = ranks(queries, candidates, true)
        for first in RECALLS:
            # Captions of one picture stand or fall together: the interval counts pictures in both directions.
            score = score_of(recall(found, first), len(data.chosen), chance_recall(true, first))
            yield Measured(f"{direction} R@{first}", "shared", score, {"candidates": len(candidates)})


def _said_of_data(data: PictureData, features: Features) -> dict[str, Any]:
    return {
        "name": data.name,
        "pictures": len(data.chosen),
        "left_out": len(data.encoded.catalogue) - len(data.chosen),
        "sha256": features.sha256,
        "seconds": round(features.seconds, 2),
    }


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
