"""Measure a tower with everything that fits it and the data given, and say it as a table and as JSON."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from assistant.embeddings import Embedder, has_text_half, load_embedder, tower_key, weight_files
from assistant.hashing import file_hash
from assistant.models import ModelError, find_tower
from assistant.naming import TEMPLATES
from assistant.towers import Tower, load_tower
from training.evaluation.feature_store import FeatureStore
from training.evaluation.features import Features, compute_features
from training.evaluation.measures import FeatureKind, Measured, Measurement, Wanted, measure_features
from training.evaluation.picture_data import PictureData, check_labels, check_options, open_all

__all__ = ["TowerFindings", "Wanted", "examine_tower", "measure_tower", "report_table", "said_of_reuse"]

PACKAGES = ("torch", "transformers", "scikit-learn")


@dataclass(frozen=True)
class TowerFindings:
    """The report of a tower, ready for JSON, and what it was made of: a page shows that."""

    report: dict[str, Any]
    data: Mapping[str, PictureData]  # by part: train, test, pairs
    features: Mapping[str, Features]
    measurement: Measurement


def measure_tower(
    source: str | Path, wanted: Wanted, data_folder: Path | None, kept: Path | None = None
) -> dict[str, Any]:
    """Everything that fits, ready for JSON; see `examine_tower`."""
    return examine_tower(source, wanted, data_folder, kept).report


def examine_tower(
    source: str | Path, wanted: Wanted, data_folder: Path | None, kept: Path | None = None
) -> TowerFindings:
    """Everything that fits: kNN, linear and few-shot probes, and with a text half zero-shot and retrieval.

    Args:
        source: a tower's folder or hub name.
        wanted: what to measure on what.
        data_folder: where shards lie, for data that are named by one.
        kept: the folder of the features that are kept and used again; None: they are neither.

    Raises:
        ModelError: the tower cannot be loaded, or lacks the text half or the patches that are wanted.
        DataError: data that are missing, damaged or do not fit together, or features that cannot be kept.
    """
    started = time.perf_counter()
    data = open_all(wanted.train, wanted.test, wanted.pairs, data_folder)
    labels = check_labels(data, wanted.neighbours)
    check_options(data, wanted.shots, wanted.templates)
    folder = find_tower(source)
    tower, embedder = _load(folder, wanted)
    _check_features(tower, wanted.features)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (embedder.model if embedder else tower).to(device)
    store = FeatureStore(kept, tower_key(folder), "bfloat16" if wanted.bf16 else "float32") if kept else None
    features = {
        part: compute_features(tower, embedder, pictures, wanted.batch, device, wanted.bf16, store)
        for part, pictures in data.items()
    }
    measurement = measure_features(embedder, data, features, labels, wanted)
    report = {
        "tower": _said_of_tower(source, folder, tower, embedder),
        "data": {part: _said_of_data(data[part], features[part]) for part in data},
        "settings": _said_of_settings(wanted),
        "scores": [_said_of_score(measured) for measured in measurement.measured],
        "versions": {package: version(package) for package in PACKAGES},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "notes": list(store.notes) if store else [],
        "seconds": round(time.perf_counter() - started, 2),
    }
    return TowerFindings(report, data, features, measurement)


def report_table(report: Mapping[str, Any]) -> Table:
    """The scores of `measure_tower`, in percent, one row each; it fits into 80 columns."""
    title = f"{report['tower']['source']} ({report['tower']['kind']}), in percent"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
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


def said_of_reuse(report: Mapping[str, Any]) -> list[str]:
    """A line for each part of the data of which features had been kept."""
    return [
        f"{data['name']}: the features of {data['reused']:,} of {data['pictures']:,} pictures had been kept"
        for data in report["data"].values()
        if data["reused"]
    ]


def _load(folder: Path, wanted: Wanted) -> tuple[Tower, Embedder | None]:
    """The tower, and the embedder that it is a part of where it has a text half."""
    if has_text_half(folder):
        embedder = load_embedder(folder)
        return embedder.tower, embedder
    if wanted.pairs or wanted.templates or not wanted.train:
        raise ModelError(
            f"the tower in {folder} has no text half, which zero-shot (--templates) and retrieval (--pairs) need: "
            "measure it with --train and --test alone, or take a CLIP or SigLIP with both halves"
        )
    return load_tower(folder).eval(), None


def _said_of_tower(source: str | Path, folder: Path, tower: Tower, embedder: Embedder | None) -> dict[str, Any]:
    return {
        "source": str(source),
        "kind": tower.model.config.model_type,
        "text_half": embedder is not None,
        "sha256": {file.name: file_hash(file) for file in weight_files(folder)},
    }


def _check_features(tower: Tower, kind: FeatureKind) -> None:
    if kind != "pooled" and not tower.has_patch_tokens:
        family = tower.model.config.model_type
        raise ModelError(f"a {family} has no patch tokens, and pools over its whole grid: take --features pooled")


def _said_of_settings(wanted: Wanted) -> dict[str, Any]:
    return asdict(wanted) | {"shots": list(wanted.shots), "templates": [*TEMPLATES, *wanted.templates]}


def _said_of_score(measured: Measured) -> dict[str, Any]:
    return {
        "measure": measured.measure,
        "features": measured.features,
        **asdict(measured.score),
        **measured.details,
    }


def _said_of_data(data: PictureData, features: Features) -> dict[str, Any]:
    return {
        "name": data.name,
        "pictures": len(data.chosen),
        "left_out": len(data.encoded.catalogue) - len(data.chosen),
        "reused": features.reused,
        "sha256": features.sha256,
        "seconds": round(features.seconds, 2),
    }


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
