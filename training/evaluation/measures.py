"""Score the features of a tower with every measure that the data and the tower allow."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from assistant.embeddings import Embedder
from assistant.naming import TEMPLATES, label_embeddings, label_shares
from training.evaluation.features import Features
from training.evaluation.few_shot import REGULARISATION, few_shot_probe
from training.evaluation.picture_data import PictureData
from training.evaluation.probes import NEIGHBOURS, knn_labels, linear_probe
from training.evaluation.scores import DRAWS, Score, score_draws, score_labels, score_of
from training.evaluation.zero_shot import chance_recall, ranks, recall, who_says_what, zero_shot_labels

FeatureKind = Literal["pooled", "patches", "both"]
RECALLS = (1, 5, 10)
PICTURE_TO_TEXT, TEXT_TO_PICTURE = "picture to text", "text to picture"


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
    shots: tuple[int, ...] = ()  # pictures of each label that a few-shot probe learns from
    templates: tuple[str, ...] = ()  # wordings of a label, to be measured beside `TEMPLATES`


@dataclass(frozen=True)
class Measured:
    """One number: what was measured on which features, its score, and how it came about."""

    measure: str
    features: str
    score: Score
    details: Mapping[str, Any] = field(default_factory=dict)
    answers: Tensor | None = None  # (Q,) int64: the label that each test picture was given, where it was given one
    shares: Tensor | None = None  # (Q, C): how likely each label was, where that was asked


@dataclass(frozen=True)
class Retrieved:
    """What was found among P pictures and T texts by one another."""

    said: list[str]
    right: Tensor  # (P, T) bool: which text is said of which picture
    pictures: Tensor  # (P, E) of unit length
    texts: Tensor  # (T, E) of unit length
    ranks: Mapping[str, Tensor]  # by direction, for each query: how many wrong ones stand before the best right one


@dataclass(frozen=True)
class Measurement:
    """Every number, and what came of each picture."""

    labels: list[str]
    measured: list[Measured]
    retrieved: Retrieved | None


def measure_features(
    embedder: Embedder | None,
    data: Mapping[str, PictureData],
    features: Mapping[str, Features],
    labels: Sequence[str],
    wanted: Wanted,
) -> Measurement:
    """All measures that fit, of data and features by their part (train, test, pairs), with `labels` to choose among."""
    measured: list[Measured] = []
    retrieved = None
    if "train" in data:
        measured += _probes(data, features, labels, wanted)
    if "test" in data and embedder:
        measured += _zero_shot(embedder, data["test"], features["test"], labels, wanted)
    if "pairs" in data and embedder:
        retrieved = _retrieve(embedder, data["pairs"], features["pairs"])
        measured += _recalls(retrieved)
    return Measurement(list(labels), measured, retrieved)


def chosen_features(features: Features, kind: FeatureKind) -> Iterator[tuple[str, Tensor]]:
    """The names and (B, D) features that probes read where `kind` is wanted."""
    if kind in ("pooled", "both"):
        yield "pooled", features.pooled
    if kind in ("patches", "both"):
        yield "patches", features.patches


def _probes(
    data: Mapping[str, PictureData], features: Mapping[str, Features], labels: Sequence[str], wanted: Wanted
) -> Iterator[Measured]:
    """kNN, linear probe and few-shot probes on each kind of features."""
    place = {label: number for number, label in enumerate(labels)}
    train_labels = torch.tensor([place[label] for label in data["train"].labels()])
    expected = [place[label] for label in data["test"].labels()]
    for (name, train), (_, test) in zip(
        chosen_features(features["train"], wanted.features),
        chosen_features(features["test"], wanted.features),
        strict=True,
    ):
        found = knn_labels(train, train_labels, test, wanted.neighbours)
        score = score_labels(found.tolist(), expected, len(labels))
        yield Measured("kNN", name, score, {"neighbours": wanted.neighbours}, found)
        probe = linear_probe(train, train_labels, test)
        details = {key: value for key, value in vars(probe).items() if key != "labels"}
        score = score_labels(probe.labels.tolist(), expected, len(labels))
        yield Measured("linear probe", name, score, details, probe.labels)
        for shots in wanted.shots:
            few = few_shot_probe(train, train_labels, test, shots)
            score = score_draws(few.labels.tolist(), expected, len(labels))
            details = {"shots": shots, "draws": DRAWS, "regularisation": REGULARISATION, "converged": few.converged}
            yield Measured(f"{shots}-shot probe", name, score, details)


def _zero_shot(
    embedder: Embedder, data: PictureData, features: Features, labels: Sequence[str], wanted: Wanted
) -> Iterator[Measured]:
    """With the wordings that are ours, and with one's own."""
    assert features.embeddings is not None
    for name, templates in (("zero-shot", TEMPLATES), ("zero-shot, own words", wanted.templates)):
        if not templates:
            continue
        embedded = label_embeddings(embedder.texts, labels, templates).cpu()
        named = zero_shot_labels(features.embeddings, embedded)
        score = score_labels([labels[number] for number in named.tolist()], data.labels(), len(labels))
        shares = label_shares(embedder, features.embeddings.to(embedder.device), embedded).cpu()
        yield Measured(name, "shared", score, {"templates": list(templates)}, named, shares)


def _retrieve(embedder: Embedder, data: PictureData, features: Features) -> Retrieved:
    assert features.embeddings is not None
    said, right = who_says_what(data.texts())
    pictures, texts = features.embeddings, embedder.texts(said).cpu()
    found = {PICTURE_TO_TEXT: ranks(pictures, texts, right), TEXT_TO_PICTURE: ranks(texts, pictures, right.T)}
    return Retrieved(said, right, pictures, texts, found)


def _recalls(retrieved: Retrieved) -> Iterator[Measured]:
    """Recall at 1, 5 and 10, from pictures to texts and back."""
    for direction, found in retrieved.ranks.items():
        true = retrieved.right if direction == PICTURE_TO_TEXT else retrieved.right.T
        for first in RECALLS:
            # Captions of one picture stand or fall together: the interval counts pictures in both directions.
            score = score_of(recall(found, first), len(retrieved.right), chance_recall(true, first))
            yield Measured(f"{direction} R@{first}", "shared", score, {"candidates": true.shape[1]})
