"""Scores of tasks: each equals an outside implementation on the same predictions."""

import random
import re
import shutil
from collections.abc import Sequence

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from scipy import stats
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from training.evaluation import caption_measures as captions
from training.evaluation.answer_measures import (
    accuracy_measure,
    mean_measure,
    true_false_measures,
    vqa_measures,
    words_measures,
    yes_no_measures,
)
from training.evaluation.captions import tokenised
from training.evaluation.likelihood_measures import choices_measures, perplexity_measures
from training.evaluation.predictions import Prediction, PredictionError
from training.evaluation.resampling import Measure, difference_of, interval_of, mcnemar
from training.evaluation.task import Task, TaskData
from training.evaluation.task_items import Item
from training.evaluation.task_scores import score_task
from training.evaluation.verdicts import verdict_of
from training.evaluation.vqa import vqa_accuracy, vqa_normalised

WORDS = ("a", "dog", "cat", "runs", "sits", "on", "the", "green", "red", "mat", "hill", "with", "two", "small")


def item(place: int, *expected: str, **more: object) -> Item:
    """Question number `place`, about a picture of its own."""
    fields: dict[str, object] = {"choices": (), "kind": None, "group": str(place)} | more
    return Item(str(place), "what?", 0, tuple(expected), **fields)  # type: ignore[arg-type]


def value(measure: Measure) -> float:
    return float(measure.value(measure.counts.sum(0)))


def by_name(measures: Sequence[Measure]) -> dict[str, float]:
    return {measure.name: value(measure) for measure in measures if measure.part is None}


def sentence(generator: random.Random) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(3, 9)))


def captioned(pictures: int) -> tuple[list[Item], list[str]]:
    """Captions of which one is empty and one right, and another number of references for each picture."""
    generator = random.Random(0)
    said = ["", *(sentence(generator) + "." for _ in range(pictures - 1))]
    people = [tuple(sentence(generator).title() for _ in range(1 + place % 4)) for place in range(pictures)]
    people[5] = (said[5],)
    return [item(n, *those) for n, those in enumerate(people)], said


def tokenised_for_coco(items: list[Item], said: list[str]) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    references = {n: [tokenised(one) for one in item.expected] for n, item in enumerate(items)}
    return references, {n: [tokenised(one)] for n, one in enumerate(said)}


def test_captions_equal_pycocoevalcap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    items, said = captioned(30)
    found = by_name(list(captions.caption_measures(items, said)))
    references, given = tokenised_for_coco(items, said)
    bleu = Bleu(4).compute_score(references, given, verbose=0)[0]
    outside = {f"BLEU-{n + 1}": 100 * bleu[n] for n in range(4)}
    for name, scorer in (("ROUGE-L", Rouge()), ("CIDEr", Cider())):
        outside[name] = 100 * float(scorer.compute_score(references, given)[0])
    assert found == pytest.approx(outside, rel=1e-9)
    assert 0 < found["BLEU-4"] < 100


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR needs Java")
def test_meteor_is_that_of_its_java_program() -> None:
    items, said = captioned(8)
    found = next(m for m in captions.caption_measures(items, said) if m.name == "METEOR")
    outside = 100 * Meteor().compute_score(*tokenised_for_coco(items, said))[0]
    interval = interval_of(found)
    assert interval.value == pytest.approx(outside)
    assert interval.low < outside < interval.high


def test_meteor_is_left_out_with_a_word_where_java_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from training.evaluation.task_scores import notes_of

    monkeypatch.setenv("PATH", "")
    task = Task(about="", kind="captions", data=TaskData(scenes=1))
    measures = score_task(task, [item(0, "a dog")], {"0": Prediction(id="0", answer="a dog")})
    assert "METEOR" not in {measure.name for measure in measures}
    assert len(measures) == 6
    assert "Java" in notes_of(task)[0]


def test_intervals_of_bleu_hold_what_drawing_by_hand_gives() -> None:
    """Corpus BLEU of pictures drawn anew, each time scored by pycocoevalcap as a whole."""
    generator = random.Random(1)
    people = [sentence(generator) for _ in range(12)]
    said = [people[n] if n % 3 else sentence(generator) for n in range(12)]
    items = [item(n, one) for n, one in enumerate(people)]
    measure = next(m for m in captions.caption_measures(items, said) if m.name == "BLEU-2")
    drawn = np.random.default_rng(0).multinomial(12, np.full(12, 1 / 12), size=20)
    for weights in drawn:
        places = [place for place, times in enumerate(weights) for _ in range(times)]
        gts = {n: [people[place]] for n, place in enumerate(places)}
        res = {n: [said[place]] for n, place in enumerate(places)}
        outside = 100 * Bleu(2).compute_score(gts, res, verbose=0)[0][1]
        assert float(measure.value(weights @ measure.counts)) == pytest.approx(outside, rel=1e-6)


@pytest.mark.parametrize(
    ("written", "alike"),
    [
        ("Two", "2"),
        ("none", "0"),
        ("TEN", "10"),
        ("eleven", "eleven"),
        ("a dog", "dog"),
        ("The dog and an owl", "dog and owl"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),  # the one that the script turns the other way round
        ("its", "its"),
        ("youre", "you're"),
        ("oclock", "o'clock"),
        ("don't", "don't"),
        ("dog.", "dog"),
        ("2.5", "2.5"),
        ("U.S.A.", "usa"),
        ("1,000", "1000"),
        ("1,000 (about)", "1000 about"),
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("yes/no", "yes no"),
        ("what ?", "what"),
        ("black-white", "black white"),
        ("t-shirt - red", "tshirt red"),
        ("yes!", "yes"),
        ("{a} cat", "cat"),
        ("10:30", "10:30"),
        ("$5", "$5"),
        ("  on\nthe\ttable ", "on table"),
    ],
)
def test_answers_are_written_alike_as_by_the_official_vqa_scorer(written: str, alike: str) -> None:
    """Cases worked out by hand from the published script's rules, quirks included."""
    assert vqa_normalised(written) == alike


@pytest.mark.parametrize("agree", range(11))
def test_ten_people_give_the_published_shares(agree: int) -> None:
    """0, 0.3, 0.6, 0.9, 1: leaving each person out in turn, as the official script does."""
    people = ["cat"] * agree + [f"other {n}" for n in range(10 - agree)]
    published = {0: 0.0, 1: 0.3, 2: 0.6, 3: 0.9}.get(agree, 1.0)
    assert vqa_accuracy("Cat.", people) == pytest.approx(published)
    left_out = []
    for person in range(10):
        others = [people[other] for other in range(10) if other != person]
        left_out.append(min(1, others.count("cat") / 3))
    assert vqa_accuracy("cat", people) == pytest.approx(sum(left_out) / 10)


def test_people_who_differ_are_scored_as_the_official_script_does() -> None:
    """Its rules in plain loops, written from the published script: both sides alike, each person left out in turn."""
    generator = random.Random(4)
    pool = ["2", "Two", "two.", "the cat", "cat", "a cat!", "it's", "its", "dont", "don't", "none", "0", "red,blue"]
    for _ in range(200):
        people = generator.choices(pool, k=10)
        answer = generator.choice(pool)
        if len(set(people)) == 1:
            continue
        alike = [official(one) for one in people]
        shares = []
        for person in range(10):
            others = [alike[other] for other in range(10) if other != person]
            shares.append(min(1, others.count(official(answer)) / 3))
        assert vqa_accuracy(answer, people) == pytest.approx(sum(shares) / 10)


def official(text: str) -> str:
    """The published script's two steps, for the words of the test above."""
    written = text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        beside_space = mark + " " in text or " " + mark in text
        written = written.replace(mark, "" if beside_space or re.search(r"(\d)(\,)(\d)", text) else " ")
    written = re.compile(r"(?!<=\d)(\.)(?!\d)").sub("", written, re.UNICODE)
    numbers = {"none": "0", "two": "2"}
    words = [numbers.get(word, word) for word in written.lower().split()]
    return " ".join({"dont": "don't"}.get(word, word) for word in words if word not in ("a", "an", "the"))


def test_fewer_people_can_give_a_full_point_too() -> None:
    assert vqa_accuracy("two", ["2"]) == 1
    assert vqa_accuracy("two", ["3"]) == 0
    assert vqa_accuracy("dog", ["the dog", "dog"]) == 1
    assert vqa_accuracy("dog", ["dog", "cat"]) == 0.5
    assert vqa_accuracy("dog", ["dog", "dog", "cat"]) == pytest.approx((0.5 + 0.5 + 1) / 3)
    with pytest.raises(ValueError, match="nobody"):
        vqa_accuracy("dog", [])
    measure = next(vqa_measures([item(0, "2"), item(1, "3")], ["two", "two"]))
    assert value(measure) == 0.5


def test_yes_or_no_equals_scikit_learn() -> None:
    generator = random.Random(2)
    expected = generator.choices(["yes", "no"], k=200)
    said = generator.choices(["Yes.", "No", "yes, it is", "no, none", "maybe"], k=200)
    items = [item(n, one, group=str(n // 2)) for n, one in enumerate(expected)]
    found = by_name(list(yes_no_measures(items, said)))
    verdicts = [verdict_of(one, "yes_no") or "neither" for one in said]
    precision, recall, f1, _ = precision_recall_fscore_support(expected, verdicts, labels=["yes"], average="macro")
    assert found == pytest.approx(
        {
            "accuracy": accuracy_score(expected, verdicts),
            "precision of yes": precision,
            "recall of yes": recall,
            "F1 of yes": f1,
            "rate of yes": verdicts.count("yes") / 200,
            "neither yes nor no": verdicts.count("neither") / 200,
        }
    )


def test_a_precision_of_nothing_is_nothing() -> None:
    measures = list(yes_no_measures([item(0, "no"), item(1, "no")], ["no", "no"]))
    precision = next(m for m in measures if m.name == "precision of yes")
    assert np.isnan([interval_of(precision).value, interval_of(precision).low]).all()


def test_consistency_is_by_nlvrs_formula() -> None:
    """Plain loops: a statement counts where it is judged rightly of every picture."""
    generator = random.Random(3)
    statements = [f"statement {n % 40}" for n in range(150)]
    expected = generator.choices(["true", "false"], k=150)
    said = [one if generator.random() < 0.8 else "False" for one in expected]
    items = [item(n, one, group=statements[n]) for n, one in enumerate(expected)]
    found = by_name(list(true_false_measures(items, said)))
    right: dict[str, list[bool]] = {}
    for statement, one, other in zip(statements, expected, said, strict=True):
        right.setdefault(statement, []).append(one == other.lower())
    assert found["consistency"] == pytest.approx(sum(all(those) for those in right.values()) / len(right))
    assert found["accuracy"] == pytest.approx(sum(those.count(True) for those in right.values()) / 150)
    assert verdict_of("Yes", "true_false") == "true" and verdict_of("perhaps", "true_false") is None


def test_words_are_scored_by_kind_beside_the_commonest_answer() -> None:
    items = [
        item(0, "2", kind="count"),
        item(1, "2", kind="count"),
        item(2, "3", kind="count"),
        item(3, "grey", "silver", kind="colour"),
    ]
    measures = list(words_measures(items, ["Two.", "three", "3", "The Gray"]))
    assert [(m.part, value(m), m.items, m.majority) for m in measures] == [
        (None, 0.75, 4, 0.5),
        ("colour", 1.0, 1, 1.0),
        ("count", pytest.approx(2 / 3), 3, pytest.approx(2 / 3)),
    ]


def test_choices_and_perplexity_are_those_of_plain_loops() -> None:
    items = [item(0, "a", choices=("a", "b")), item(1, "b", choices=("a", "b", "c"))]
    those = [
        Prediction(id="0", likelihoods=(-4.0, -3.0), tokens=(4, 1)),  # by token the first, by the whole the second
        Prediction(id="1", likelihoods=(-9.0, -1.0, -2.0), tokens=(3, 1, 1)),
    ]
    measures = list(choices_measures(items, those))
    assert [(m.name, value(m), m.chance) for m in measures] == [
        ("accuracy, by likelihood a token", 1.0, pytest.approx((1 / 2 + 1 / 3) / 2)),
        ("accuracy, by likelihood", 0.5, pytest.approx((1 / 2 + 1 / 3) / 2)),
    ]
    texts = [item(0, "four"), item(1, "é")]
    weighed = [
        Prediction(id="0", likelihoods=(-3.0,), tokens=(2,)),
        Prediction(id="1", likelihoods=(-1.0,), tokens=(3,)),
    ]
    found = by_name(list(perplexity_measures(texts, weighed)))
    assert found == pytest.approx({"perplexity of a token": np.exp(4 / 5), "bits a byte": 4 / np.log(2) / 6})


def test_an_interval_of_a_share_is_scipys_where_every_answer_stands_alone() -> None:
    for right in (0, 3, 17, 40):
        items = [item(n, "x") for n in range(40)]
        measure = accuracy_measure("accuracy", items, np.array([1.0] * right + [0.0] * (40 - right)), None)
        low, high = stats.binomtest(right, 40).proportion_ci(method="wilson")
        found = interval_of(measure)
        assert (found.low, found.high) == pytest.approx((low, high))


def test_an_interval_knows_what_belongs_together() -> None:
    """Ten answers about each of twenty pictures, all right or all wrong, tell no more than twenty answers."""
    right = np.repeat([1.0, 0.0], [120, 80])
    together = accuracy_measure("a", [item(n, "x", group=str(n // 10)) for n in range(200)], right, None)
    alone = accuracy_measure("a", [item(n, "x") for n in range(20)], np.repeat([1.0, 0.0], [12, 8]), None)
    assert (interval_of(together).low, interval_of(together).high) == pytest.approx(
        (interval_of(alone).low, interval_of(alone).high)
    )


def test_the_bootstrap_is_scipys() -> None:
    values = np.random.default_rng(0).gamma(2, size=80)
    found = interval_of(mean_measure("m", [item(n, "x") for n in range(80)], values), draws=20_000)
    outside = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    assert (found.low, found.high) == pytest.approx((outside.low, outside.high), rel=0.01)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (3, 9), (20, 20), (1, 0), (80, 51)])
def test_mcnemar_is_scipys_binomial_test(gained: int, lost: int) -> None:
    outside = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(outside)


def test_differences_take_the_test_that_fits() -> None:
    generator = np.random.default_rng(1)
    items = [item(n, "x") for n in range(60)]
    one, other = ((generator.random(60) < share).astype(float) for share in (0.8, 0.5))
    first, second = (accuracy_measure("a", items, right, None) for right in (one, other))
    found = difference_of(first, second)
    assert found.test == "McNemar, exact"
    gained, lost = int((one > other).sum()), int((one < other).sum())
    assert found.p == pytest.approx(stats.binomtest(gained, gained + lost).pvalue)
    assert found.value == pytest.approx(one.mean() - other.mean())
    assert found.low < found.value < found.high

    values = generator.normal(0.3, 1, 40), generator.normal(0, 1, 40)
    first, second = (mean_measure("m", items[:40], some) for some in values)
    found = difference_of(first, second)
    assert found.test == "paired permutation"
    outside = stats.permutation_test(
        values,
        lambda a, b, axis: np.mean(a, axis) - np.mean(b, axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=9_999,
        rng=2,
    )
    assert found.p == pytest.approx(outside.pvalue, abs=0.02)
    with pytest.raises(ValueError, match="same items"):
        difference_of(first, mean_measure("m", items[1:41], values[1]))


def test_questions_about_one_picture_change_places_together() -> None:
    """Every question twice would make p smaller; the same picture's two answers are one observation."""
    right = np.repeat([1.0] * 9 + [0.0], 10), np.repeat([0.0] * 4 + [1.0] * 6, 10)
    items = [item(n, "x", group=str(n // 10)) for n in range(100)]
    first, second = (accuracy_measure("a", items, some, None) for some in right)
    found = difference_of(first, second)
    assert found.test == "paired permutation"
    assert found.p == pytest.approx(stats.binomtest(1, 5).pvalue, abs=0.02)


@pytest.mark.parametrize(
    ("kind", "prediction", "said"),
    [
        ("words", Prediction(id="0", likelihoods=(1.0,), tokens=(1,)), "no answer"),
        ("choices", Prediction(id="0", answer="a"), "2 likelihoods"),
        ("choices", Prediction(id="0", likelihoods=(-1.0,), tokens=(1,)), "2 likelihoods"),
        ("choices", Prediction(id="0", likelihoods=(-1.0, -2.0), tokens=(1, 0)), "2 likelihoods"),
    ],
)
def test_predictions_of_another_kind_are_refused(kind: str, prediction: Prediction, said: str) -> None:
    task = Task.model_validate({"about": "", "kind": kind, "data": {"scenes": 1}})
    asked = item(0, "a", choices=("a", "b") if kind == "choices" else ())
    with pytest.raises(PredictionError, match=said):
        score_task(task, [asked], {"0": prediction})
    with pytest.raises(PredictionError, match="nothing to score"):
        score_task(task, [], {})
