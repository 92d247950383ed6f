"""Measures of towers: probes against scikit-learn, the shared space against transformers, the command as it is run."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from scipy.stats import t as student
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer
from tiny import make_tiny_tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
)
from typer.testing import CliRunner

from assistant.embeddings import load_embedder
from assistant.models import ModelError
from assistant.naming import label_embeddings, label_prompts
from assistant.tower_shapes import ResNetShape, clip_tokenizer
from assistant.towers import new_tower
from training.data.pictures import DataError
from training.data.scenes import make_scene
from training.evaluation.features import compute_features
from training.evaluation.few_shot import draw_shots, few_shot_probe
from training.evaluation.picture_data import open_data, read_templates
from training.evaluation.probes import knn_labels, linear_probe
from training.evaluation.scores import DRAWS, STUDENT, score_draws, score_labels, wilson_interval
from training.evaluation.tower_report import Wanted, measure_tower
from training.evaluation.zero_shot import (
    chance_recall,
    ranks,
    recall,
    who_says_what,
)
from ui.command_line import app

SIDE = 32
TEXTS = ["A red circle.", "Two green squares on white.", "A", "the word window in orange letters " * 9]
COLOURS = {"red": (200, 40, 40), "green": (40, 190, 60), "blue": (50, 60, 200)}
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def clustered(count: int, seed: int = 0, labels: int = 5, width: int = 12) -> tuple[Tensor, Tensor]:
    """Features (count, width) around a centre for each label, close enough that some are taken for others."""
    centres = torch.randn(labels, width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(count) % labels
    return centres[place] + 1.5 * torch.randn(count, width, generator=generator), place


@pytest.mark.parametrize("neighbours", [1, 5, 20])
@pytest.mark.parametrize("temperature", [0.07, 1.0, None])
def test_knn_equals_scikit_learn(neighbours: int, temperature: float | None) -> None:
    (train, labels), (test, expected) = clustered(100, seed=1), clustered(150, seed=2)

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / temperature)

    peer = KNeighborsClassifier(neighbours, metric="cosine", weights=weights if temperature else "uniform")
    peer.fit(train.double().numpy(), labels.numpy())
    found = knn_labels(train, labels, test, neighbours, temperature)
    assert found.tolist() == peer.predict(test.double().numpy()).tolist()
    assert 0.5 < (found == expected).float().mean() < 1


def test_knn_survives_a_tiny_temperature_and_refuses_too_many_neighbours() -> None:
    train, labels = clustered(30)
    assert torch.equal(knn_labels(train, labels, train, 10, 1e-4), labels)  # each is its own nearest neighbour
    with pytest.raises(ValueError, match="31 neighbours of 30"):
        knn_labels(train, labels, train, 31)


def test_the_linear_probe_is_the_penalised_optimum() -> None:
    """torch minimises the same sum, written out: cross-entropy, plus half the squared weights over C."""
    (train, labels), (test, expected) = clustered(200, seed=1), clustered(200, seed=2)
    probe = linear_probe(train, labels, test)
    assert probe.converged
    mean, deviation = train.double().mean(0), train.double().std(0, unbiased=False)
    layer = torch.nn.Linear(train.shape[1], 5).double()
    optimiser = torch.optim.LBFGS(layer.parameters(), max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        logits = layer((train.double() - mean) / deviation)
        penalty = layer.weight.square().sum() / (2 * probe.regularisation)
        value = functional.cross_entropy(logits, labels, reduction="sum") + penalty
        value.backward()
        return value

    optimiser.step(loss)
    best = layer((test.double() - mean) / deviation).argmax(-1)
    # L-BFGS of the two stops at slightly different places: a picture on the border may fall on either side.
    assert (probe.labels == best).sum() >= 199
    assert (probe.labels == expected).float().mean() > 0.6


def test_the_linear_probe_chooses_its_penalty_without_the_test_features() -> None:
    train, labels = clustered(60)
    one, other = linear_probe(train, labels, train), linear_probe(train, labels, torch.zeros(3, train.shape[1]))
    assert (one.regularisation, one.held_out_accuracy) == (other.regularisation, other.held_out_accuracy)


def test_the_linear_probe_works_on_two_pictures_a_label_and_refuses_one() -> None:
    train, labels = clustered(10)
    assert linear_probe(train, labels, train).labels.shape == (10,)
    with pytest.raises(ValueError, match="two training pictures"):
        linear_probe(train[:9], labels[:9], train)


def test_shots_are_drawn_alike_of_each_label_and_grow() -> None:
    """So many of each label, none twice; the same draw again is the same, and fewer are some of it."""
    labels = torch.tensor([0, 1, 2, 2, 1, 0, 0, 1, 2, 0, 2, 1, 1, 1])
    for shots in (1, 2, 4):
        shown = draw_shots(labels, shots, 3)
        assert labels[shown].bincount().tolist() == [shots] * 3
        assert len(set(shown.tolist())) == 3 * shots
        assert torch.equal(shown, draw_shots(labels, shots, 3))
        assert {*draw_shots(labels, 1, 3).tolist()} <= {*shown.tolist()}
    assert len({tuple(draw_shots(labels, 2, draw).tolist()) for draw in range(5)}) > 1
    with pytest.raises(ValueError, match="5 shots of label 0, which has 4 pictures"):
        draw_shots(labels, 5, 0)


@pytest.mark.parametrize("shots", [1, 5, 10])
def test_the_few_shot_probe_equals_scikit_learn(shots: int) -> None:
    """Its own pipeline of features at unit length and logistic regression, on the same pictures of each draw."""
    (train, labels), (test, _) = clustered(120, seed=1), clustered(150, seed=2)
    probe = few_shot_probe(train, labels, test, shots)
    assert probe.converged
    assert probe.labels.shape == (DRAWS, 150)
    for draw in range(DRAWS):
        shown = draw_shots(labels, shots, draw)
        peer = make_pipeline(Normalizer(), LogisticRegression(C=1.0, max_iter=1000, tol=1e-8))
        peer.fit(train[shown].double().numpy(), labels[shown].numpy())
        assert (torch.from_numpy(peer.predict(test.double().numpy())) == probe.labels[draw]).sum() >= 149


def test_more_shots_help_and_features_without_meaning_stay_at_chance() -> None:
    (train, labels), (test, expected) = clustered(200, seed=1), clustered(200, seed=2)
    right = [
        score_draws(few_shot_probe(train, labels, test, shots).labels.tolist(), expected.tolist(), 5).right
        for shots in (1, 5, 20)
    ]
    assert 0.3 < right[0] < right[1] < right[2]
    noise = torch.randn(400, 12, generator=torch.Generator().manual_seed(5))
    score = score_draws(few_shot_probe(noise[:200], labels, noise[200:], 5).labels.tolist(), expected.tolist(), 5)
    assert score.low <= score.chance <= score.high


def test_the_interval_of_draws_holds_the_truth() -> None:
    """In 1000 made experiments whose pictures and draws both vary, the true share lies in it 95 times in 100."""
    assert pytest.approx(student.ppf(0.975, DRAWS - 1)) == STUDENT
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        hard = generator.normal(0.7, 0.15, 100)
        shares = (hard[None] + generator.normal(0, 0.05, (DRAWS, 1))).clip(0, 1)
        score = score_draws((generator.random(shares.shape) < shares).tolist(), [True] * 100, 2)
        held += score.low <= 0.7 <= score.high
    assert 940 <= held <= 1000
    same = score_draws([[1, 0, 1, 1]] * DRAWS, [1, 1, 1, 1], 2)
    assert (same.low, same.high) == pytest.approx(wilson_interval(0.75, 4))
    assert same.right == 0.75
    with pytest.raises(ValueError, match="2 draws"):
        score_draws([[1], [0]], [1], 2)


def test_features_without_meaning_score_at_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(400, 8, generator=generator), torch.randn(400, 8, generator=generator)
    labels = torch.arange(400) % 4
    for found in (knn_labels(train, labels, test), linear_probe(train, labels, test).labels):
        score = score_labels(found.tolist(), labels.tolist(), 4)
        assert score.low < score.chance < score.high
        assert score.chance == score.majority == 0.25


@pytest.mark.parametrize(("right", "count"), [(0, 7), (7, 7), (1, 2), (30, 1000), (999, 1000)])
def test_the_interval_is_wilsons(right: int, count: int) -> None:
    expected = binomtest(right, count).proportion_ci(0.95, "wilson")
    assert wilson_interval(right / count, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_majority_is_the_best_constant_answer() -> None:
    score = score_labels(["a", "a", "b", "b", "a"], ["a", "b", "b", "b", "c"], 3)
    assert (score.right, score.majority, score.chance, score.pictures) == (0.6, 0.6, 1 / 3, 5)


def test_ranks_and_recall_equal_plain_loops() -> None:
    generator = torch.Generator().manual_seed(3)
    pictures = functional.normalize(torch.randn(9, 6, generator=generator), dim=-1)
    texts = functional.normalize(torch.randn(23, 6, generator=generator), dim=-1)
    right = torch.zeros(9, 23, dtype=torch.bool)
    right[torch.arange(23) % 9, torch.arange(23)] = True
    for queries, candidates, true in ((pictures, texts, right), (texts, pictures, right.T)):
        found = ranks(queries, candidates, true)
        for first in (1, 5, 10):
            hits = 0
            for query, own in zip(queries, true, strict=True):
                best = sorted(range(len(candidates)), key=lambda n: -float(query @ candidates[n]))[:first]
                hits += any(own[n] for n in best)
            assert recall(found, first) == pytest.approx(hits / len(queries))


def test_a_tower_that_maps_all_to_one_point_finds_nothing() -> None:
    point = functional.normalize(torch.ones(12, 4), dim=-1)
    assert recall(ranks(point, point, torch.eye(12, dtype=torch.bool)), 10) == 0


def test_chance_recall_is_the_mean_over_all_orders() -> None:
    right = torch.tensor([[True, False, False, False, True], [False, True, False, False, False], [True] * 5])
    orders = list(itertools.permutations(range(5)))
    for first in (1, 2, 4, 5, 9):
        hits = [any(row[n] for n in order[:first]) for row in right for order in orders]
        assert chance_recall(right, first) == pytest.approx(sum(hits) / len(hits))


def test_a_text_said_of_two_pictures_is_right_for_both() -> None:
    texts, right = who_says_what([("a dog", "a brown dog"), ("a dog", "a cat"), ("a cat", "a cat")])
    assert texts == ["a dog", "a brown dog", "a cat"]
    assert right.tolist() == [[True, True, False], [True, False, True], [False, False, True]]


def test_label_embeddings_are_the_mean_of_each_labels_prompts() -> None:
    def embed(texts: Sequence[str]) -> Tensor:
        drawn = [torch.randn(8, generator=torch.Generator().manual_seed(sum(text.encode()))) for text in texts]
        return functional.normalize(torch.stack(drawn), dim=-1)

    templates = ("A {}.", "One {} here.")
    found = label_embeddings(embed, ["sea_horse", "cup"], templates)
    for row, label in zip(found, ("sea horse", "cup"), strict=True):
        mean = (embed([f"A {label}."])[0] + embed([f"One {label} here."])[0]) / 2
        torch.testing.assert_close(row, mean / mean.norm())
    with pytest.raises(ValueError, match="A thing"):
        label_prompts("cup", ["A thing."])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """Pads on the right, as text halves read."""
    tokenizer = make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    tokenizer.padding_side = "right"
    return tokenizer


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a tiny SigLIP of random weights."""
    folder = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(1)
    text = SHAPE | {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_size": 32}
    vision = SHAPE | {"image_size": SIDE, "patch_size": 8}
    SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    SiglipProcessor(SiglipImageProcessor(size={"height": SIDE, "width": SIDE}, resample=2), tokenizer).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a tiny CLIP of random weights. It crops pictures, projects, and its texts have an end."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(2)
    ending = clip_tokenizer(tokenizer, 20)
    text = SHAPE | {"vocab_size": len(ending), "max_position_embeddings": 20, "eos_token_id": ending.eos_token_id}
    vision = SHAPE | {"image_size": SIDE, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    CLIPModel(config).save_pretrained(folder)
    resized = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    CLIPProcessor(resized, ending).save_pretrained(folder)
    return folder


@pytest.fixture(params=["clip", "siglip"])
def both_halves(request: pytest.FixtureRequest) -> Path:
    """The folder of a model with a picture and a text half, one of either kind."""
    folder: Path = request.getfixturevalue(request.param)
    return folder


def scene_pictures(count: int, first: int = 0) -> list[Image.Image]:
    """Generated scenes of differing sizes."""
    return [make_scene(first + n).image.resize((40 + 7 * n % 60, 70)) for n in range(count)]


def pixels(picture: Image.Image) -> Tensor:
    """uint8 (3, H, W)."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def peer_output(folder: Path, pictures: Sequence[Image.Image], texts: Sequence[str]) -> Any:
    """What the model gives in transformers alone, called as its documentation says: embeddings and logits."""
    processor, model = AutoProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    is_clip = isinstance(model, CLIPModel)
    padding = {"padding": True} if is_clip else {"padding": "max_length"}
    length = model.config.text_config.max_position_embeddings
    inputs = processor(
        images=list(pictures), text=list(texts), truncation=True, max_length=length, return_tensors="pt", **padding
    )
    if not is_clip:
        inputs.pop("attention_mask", None)
    with torch.no_grad():
        return model(**inputs)


def test_embeddings_equal_transformers(both_halves: Path) -> None:
    """The cosine of every picture with every text, scaled as the model does, is transformers' own logit."""
    embedder = load_embedder(both_halves)
    pictures = scene_pictures(6)
    found, texts = embedder.pictures([pixels(picture) for picture in pictures]), embedder.texts(TEXTS)
    for embedded in (found, texts):
        torch.testing.assert_close(embedded.norm(dim=-1), torch.ones(len(embedded)))
    logits = found @ texts.T * embedder.model.logit_scale.exp()
    if isinstance(embedder.model, SiglipModel):
        logits = logits + embedder.model.logit_bias
    torch.testing.assert_close(logits, peer_output(both_halves, pictures, TEXTS).logits_per_image, atol=1e-5, rtol=1e-5)


def test_a_text_is_embedded_alike_in_any_company(both_halves: Path) -> None:
    embedder = load_embedder(both_halves)
    torch.testing.assert_close(embedder.texts(TEXTS)[2:3], embedder.texts(TEXTS[2:3]), atol=1e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled folders `train` and `test` of noisy colours, and `pairs.jsonl`, scenes with several captions each."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 5)):
        for label, colour in COLOURS.items():
            (folder / part / label).mkdir(parents=True)
            for number in range(count):
                noisy = np.clip(generator.normal(colour, 70, (36, 40, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(noisy).save(folder / part / label / f"{number}.png")
    lines = []
    for number, picture in enumerate(scene_pictures(12, first=50)):
        picture.save(folder / f"{number}.png")
        captions = list(make_scene(50 + number).captions) + [f"Picture number {number}."][: number % 2]
        lines.append(json.dumps({"image": f"{number}.png", "captions": captions}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny DINOv2 of random weights: a tower without a text half."""
    folder = tmp_path_factory.mktemp("dinov2")
    Dinov2Model(Dinov2Config(**SHAPE, image_size=SIDE, patch_size=8)).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def wanted(data: Path, *parts: str, **more: Any) -> Wanted:
    """These parts of `data`, and few neighbours, for there are few pictures."""
    given: dict[str, Any] = {part: str(data / ("pairs.jsonl" if part == "pairs" else part)) for part in parts}
    return Wanted(**given | {"neighbours": 5, "batch": 4} | more)


def scores_of(report: dict[str, Any]) -> dict[tuple[str, str], float]:
    """The share that was right, by measure and features."""
    return {(score["measure"], score["features"]): score["right"] for score in report["scores"]}


def labelled(folder: Path) -> tuple[list[Image.Image], list[str]]:
    """The pictures below `folder` and the names of their folders."""
    files = sorted(folder.rglob("*.png"))
    return [Image.open(file).convert("RGB") for file in files], [file.parent.name for file in files]


def test_probes_of_a_report_equal_peers_on_features_of_transformers(dinov2: Path, data: Path) -> None:
    """DINOv2's pooled output, and the mean of its tokens after the first, straight from transformers."""
    report = measure_tower(dinov2, wanted(data, "train", "test", features="both"), None)
    processor, model = AutoImageProcessor.from_pretrained(dinov2), AutoModel.from_pretrained(dinov2).eval()
    features, labels = {}, {}
    for part in ("train", "test"):
        pictures, labels[part] = labelled(data / part)
        with torch.no_grad():
            output = model(**processor(pictures, return_tensors="pt"))
        features[part] = {"pooled": output.pooler_output, "patches": output.last_hidden_state[:, 1:].mean(1)}
    found = scores_of(report)
    for kind in ("pooled", "patches"):
        peer = KNeighborsClassifier(5, metric="cosine", weights=lambda distances: np.exp((1 - distances) / 0.07))
        peer.fit(features["train"][kind].numpy(), labels["train"])
        assert found["kNN", kind] == pytest.approx(peer.score(features["test"][kind].numpy(), labels["test"]))
        assert found["linear probe", kind] > 0.8  # colours are told apart even by random weights
    assert {measure for measure, _ in found} == {"kNN", "linear probe"}
    assert report["tower"]["text_half"] is False


def test_zero_shot_and_retrieval_of_a_report_equal_transformers(both_halves: Path, data: Path) -> None:
    found = scores_of(measure_tower(both_halves, wanted(data, "test", "pairs"), None))

    pictures, labels = labelled(data / "test")
    names = sorted(COLOURS)
    prompts = [prompt for name in names for prompt in label_prompts(name)]
    peer = peer_output(both_halves, pictures, prompts)
    of_names = functional.normalize(peer.text_embeds.unflatten(0, (len(names), -1)).mean(1), dim=-1)
    nearest = (peer.image_embeds @ of_names.T).argmax(-1)
    right = [names[number] == label for number, label in zip(nearest.tolist(), labels, strict=True)]
    assert found["zero-shot", "shared"] == pytest.approx(np.mean(right))

    lines = [json.loads(line) for line in (data / "pairs.jsonl").read_text().splitlines()]
    texts, own = who_says_what([line["captions"] for line in lines])
    pictures = [Image.open(data / line["image"]).convert("RGB") for line in lines]
    logits = peer_output(both_halves, pictures, texts).logits_per_image
    for direction, table, true in (("picture to text", logits, own), ("text to picture", logits.T, own.T)):
        for first in (1, 5, 10):
            hit = true.gather(1, table.topk(first, dim=1).indices).any(1).double().mean()
            assert found[f"{direction} R@{first}", "shared"] == pytest.approx(float(hit))


def test_own_wordings_are_measured_beside_the_usual_ones(siglip: Path, data: Path, tmp_path: Path) -> None:
    """The ensemble of the file's lines, by transformers; blank lines are passed over."""
    file = tmp_path / "templates.txt"
    file.write_text("a {} circle\n\n  the word {}\n")
    templates = read_templates(file)
    assert templates == ("a {} circle", "the word {}")
    found = measure_tower(siglip, wanted(data, "test", templates=templates), None)
    assert [score["measure"] for score in found["scores"]] == ["zero-shot", "zero-shot, own words"]
    pictures, labels = labelled(data / "test")
    names = sorted(COLOURS)
    prompts = [template.replace("{}", name) for name in names for template in templates]
    peer = peer_output(siglip, pictures, prompts)
    of_names = functional.normalize(peer.text_embeds.unflatten(0, (len(names), -1)).mean(1), dim=-1)
    nearest = (peer.image_embeds @ of_names.T).argmax(-1)
    right = [names[number] == label for number, label in zip(nearest.tolist(), labels, strict=True)]
    assert found["scores"][1]["right"] == pytest.approx(np.mean(right))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"A photo of a {}.\na photo of a dog\n", r"templates\.txt, line 2: 'a photo of a dog' has no {}"),
        (b"\n \n", "no template"),
        (b"\xff\xfe{}", "no text in UTF-8"),
        (None, "No such file"),
    ],
)
def test_templates_that_cannot_be_used_are_refused(content: bytes | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "templates.txt").write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_templates(tmp_path / "templates.txt")


def test_few_shot_probes_of_a_report_stand_beside_their_baselines(dinov2: Path, data: Path) -> None:
    report = measure_tower(dinov2, wanted(data, "train", "test", features="both", shots=(1, 5)), None)
    scores = {(score["measure"], score["features"]): score for score in report["scores"]}
    for kind in ("pooled", "patches"):
        for shots in (1, 5):
            score = scores[f"{shots}-shot probe", kind]
            assert score["low"] <= score["right"] <= score["high"]
            assert (score["chance"], score["majority"], score["pictures"]) == (1 / 3, 1 / 3, 15)
            assert (score["shots"], score["draws"], score["regularisation"]) == (shots, DRAWS, 1.0)
    assert json.loads(json.dumps(report)) == report


def test_a_report_says_what_it_was_made_of(siglip: Path, data: Path, tmp_path: Path) -> None:
    """It is JSON as it stands; its hashes follow the pictures, the labels and the weights, not where they lie."""
    moved = tmp_path / "elsewhere"
    shutil.copytree(data, moved)
    first, second = (measure_tower(siglip, wanted(place, "train", "test"), None) for place in (data, moved))
    assert json.loads(json.dumps(first)) == first
    assert first["scores"] == second["scores"]
    assert hashes(first) == hashes(second)
    for score in first["scores"]:
        assert score["low"] <= score["right"] <= score["high"]
        assert (score["chance"], score["majority"], score["pictures"]) == (1 / 3, 1 / 3, 15)

    Image.new("RGB", (9, 9)).save(moved / "test" / "red" / "0.png")
    (moved / "train" / "red" / "0.png").rename(moved / "train" / "blue" / "9.png")
    model = SiglipModel.from_pretrained(siglip)
    model.logit_scale.data += 1
    shutil.copytree(siglip, tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    third = measure_tower(tmp_path / "model", wanted(moved, "train", "test"), None)
    assert not {*hashes(first).values()} & {*hashes(third).values()}


def hashes(report: dict[str, Any]) -> dict[str, str]:
    """The hash of each part of the data, and of the tower's file of weights."""
    return {part: said["sha256"] for part, said in report["data"].items()} | report["tower"]["sha256"]


def test_bfloat16_changes_features_a_little_and_no_more(both_halves: Path, data: Path) -> None:
    embedder = load_embedder(both_halves)
    pictures = open_data(str(data / "test"), "labels", Path)
    device = torch.device("cpu")
    exact, rough = (compute_features(embedder.tower, embedder, pictures, 4, device, bf16) for bf16 in (False, True))
    for name in ("pooled", "patches", "embeddings"):
        one, other = getattr(exact, name), getattr(rough, name)
        assert other.dtype == torch.float32
        assert not torch.equal(one, other)
        assert functional.cosine_similarity(one, other).min() > 0.999


def keep(folder: Path, *kept: str) -> None:
    """Removes every picture of `folder` but these."""
    for file in folder.rglob("*.png"):
        if str(file.relative_to(folder)) not in kept:
            file.unlink()


REFUSED: list[tuple[dict[str, str], Callable[[Path], Any], str]] = [
    ({}, lambda folder: None, "nothing to measure on"),
    ({"train": "train"}, lambda folder: None, "--train needs --test"),
    ({"train": "test", "test": "test"}, lambda folder: None, "find its own pictures"),
    (
        {"train": "train", "test": "test"},
        lambda folder: (folder / "test" / "red").rename(folder / "test" / "pink"),
        "no training picture has: 'pink'",
    ),
    (
        {"train": "train", "test": "test"},
        lambda folder: keep(folder / "train" / "red", "1.png"),
        "picture only of 'red'",
    ),
    ({"train": "train", "test": "test"}, lambda folder: keep(folder / "train", "red/1.png"), "the label 'red'"),
    ({"test": "test"}, lambda folder: shutil.rmtree(folder / "test"), "there is no folder"),
    ({"test": "test"}, lambda folder: keep(folder / "test"), "no picture"),
    ({"test": "test/red"}, lambda folder: None, "none of the 5 pictures has labels"),
    ({"test": "test"}, lambda folder: (folder / "test" / "red" / "1.png").write_bytes(b"x"), "1.png.*of all pictures"),
    ({"pairs": "pairs.jsonl"}, lambda folder: (folder / "3.png").unlink(), "3.png"),
    ({"pairs": "test"}, lambda folder: None, "none of the 15 pictures has captions"),
]


@pytest.mark.parametrize(("parts", "change", "said"), REFUSED)
def test_data_that_do_not_fit_are_refused(
    siglip: Path, data: Path, tmp_path: Path, parts: dict[str, str], change: Callable[[Path], Any], said: str
) -> None:
    shutil.copytree(data, tmp_path / "data")
    change(tmp_path / "data")
    given: dict[str, Any] = {part: str(tmp_path / "data" / name) for part, name in parts.items()}
    with pytest.raises(DataError, match=said):
        measure_tower(siglip, Wanted(**given, neighbours=1), None)


def test_options_that_do_not_fit_the_data_are_refused(siglip: Path, dinov2: Path, data: Path) -> None:
    with pytest.raises(DataError, match=r"--shots 1,7: folder .*train has 6 pictures of 'blue'; ask for 1 to 6"):
        measure_tower(siglip, wanted(data, "train", "test", shots=(1, 7)), None)
    with pytest.raises(DataError, match="--shots needs --train"):
        measure_tower(siglip, wanted(data, "test", shots=(1,)), None)
    with pytest.raises(DataError, match="--templates needs --test"):
        measure_tower(siglip, wanted(data, "pairs", templates=("a {}",)), None)
    with pytest.raises(ModelError, match=r"no text half.*--templates"):
        measure_tower(dinov2, wanted(data, "train", "test", templates=("a {}",)), None)


def test_a_shard_needs_the_folder_of_shards(siglip: Path, data: Path) -> None:
    with pytest.raises(DataError, match="--data"):
        measure_tower(siglip, Wanted(test="birds"), None)
    with pytest.raises(DataError, match=r"birds-00\.parquet"):
        measure_tower(siglip, Wanted(test="birds"), data)


def test_more_neighbours_than_pictures_are_refused(siglip: Path, data: Path) -> None:
    with pytest.raises(DataError, match="19 neighbours of 18 pictures"):
        measure_tower(siglip, wanted(data, "train", "test", neighbours=19), None)


@pytest.mark.parametrize("part", ["test", "pairs"])
def test_without_a_text_half_only_probes_are_measured(dinov2: Path, data: Path, part: str) -> None:
    with pytest.raises(ModelError, match=r"text half.*--train"):
        measure_tower(dinov2, wanted(data, part), None)


def test_a_tower_without_patch_tokens_has_pooled_features_only(data: Path, tmp_path: Path) -> None:
    new_tower(ResNetShape(depth=18, image_side=SIDE)).save(tmp_path)
    with pytest.raises(ModelError, match="--features pooled"):
        measure_tower(tmp_path, wanted(data, "train", "test", features="both"), None)
    found = scores_of(measure_tower(tmp_path, wanted(data, "train", "test"), None))
    assert found["linear probe", "pooled"] > 0.8


def test_the_command_prints_a_table_and_writes_json(siglip: Path, data: Path, tmp_path: Path) -> None:
    given = {"--train": data / "train", "--test": data / "test", "--pairs": data / "pairs.jsonl"}
    options = [str(word) for option in given.items() for word in option]
    out, page = tmp_path / "report.json", tmp_path / "report.html"
    (tmp_path / "templates.txt").write_text("a {} circle")
    more = ["--shots", "5,1", "--templates", str(tmp_path / "templates.txt"), "--page", str(page)]
    words: list[str | Path] = ["evaluate", siglip, *options, *more, "--neighbours", "5", "--out", out]
    command = [Path(sys.executable).with_name("kangaroo"), *words]
    environment = os.environ | {"COLUMNS": "80", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    assert "had been kept" not in done.stderr
    report = json.loads(out.read_text())
    assert len(report["scores"]) == 12
    text = page.read_text()
    assert all(f"<td>{score['measure']}<small>" in text for score in report["scores"])
    assert list((tmp_path / "kangaroo" / "features").rglob("*.safetensors"))
    again = CliRunner().invoke(app, [*map(str, words), "--features-folder", str(tmp_path / "kangaroo" / "features")])
    assert again.exit_code == 0, again.stderr
    assert again.stderr.count("had been kept") == 3
    assert json.loads(out.read_text())["scores"] == report["scores"]
    # No heading is cut; above it stands a title that may take two lines.
    assert "pictures" in " ".join(done.stdout.splitlines()[1:3])
    for score in report["scores"]:
        row = next(line for line in done.stdout.splitlines() if line.strip().startswith(f"{score['measure']} "))
        shares = [score[part] for part in ("right", "low", "high", "chance", "majority") if score[part] is not None]
        assert re.findall(r"\d+\.\d", row) == [f"{100 * share:.1f}" for share in shares]
        assert row.split()[-1] == str(score["pictures"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "no/such/folder/a.json"], "--out"),
        (["--page", "no/such/folder/a.html"], "--page"),
        (["--train", "train"], "--train needs --test"),
        (["--shots", "1,many"], "--shots 1,many: numbers"),
        (["--shots", "0,5"], "--shots 0,5: numbers"),
        (["--templates", "no/such/file.txt"], "--templates no/such/file.txt: No such file"),
    ],
)
def test_the_command_refuses_in_one_line(words: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["evaluate", *words])
    assert (done.exit_code, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert said in done.stderr


def test_the_command_names_its_features() -> None:
    done = CliRunner().invoke(app, ["evaluate", "--features", "class"])
    assert done.exit_code == 2
    assert "pooled" in done.stderr
