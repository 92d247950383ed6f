"""Scores of captions against people's: BLEU-1 to 4, ROUGE-L, CIDEr, and METEOR where there is Java."""

import shutil
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from training.data.pictures import DataError
from training.evaluation.answer_measures import mean_measure
from training.evaluation.captions import scorers, tokenised
from training.evaluation.resampling import Measure, grouped, ratio
from training.evaluation.task_items import Item

ORDERS = 4  # n-grams of BLEU
# pycocoevalcap's own small numbers, so that no count is divided by nothing.
SMALL, TINY = 1e-9, 1e-15
NO_METEOR = "METEOR is left out: it needs Java, and no program java is here"


def caption_measures(items: Sequence[Item], answers: Sequence[str]) -> Iterator[Measure]:
    """The scores of captions, in the units of papers: 0 to 100, and CIDEr 0 to 1000; see `captions.score_captions`.

    Drawing pictures anew leaves the weights of words as they are in CIDEr, which come of all references.
    Raises ImportError where the package `pycocoevalcap` is not installed.
    """
    said = {place: [tokenised(answer)] for place, answer in enumerate(answers)}
    people = {place: [tokenised(one) for one in item.expected] for place, item in enumerate(items)}
    names, counts = grouped([item.group for item in items], bleu_counts(said, people))
    for order in range(1, ORDERS + 1):
        yield Measure(f"BLEU-{order}", names, counts, partial(bleu, order=order), len(items), unit="points")
    _, cider = scorers()
    yield mean_measure("ROUGE-L", items, 100 * rouge_l(said, people), "points")
    yield mean_measure("CIDEr", items, 100 * np.asarray(cider.compute_score(people, said)[1]), "points")
    if has_java():
        yield _meteor(items, said, people)


def has_java() -> bool:
    """Whether METEOR, a Java program inside pycocoevalcap, can be run."""
    return shutil.which("java") is not None


def bleu_counts(said: dict[int, list[str]], people: dict[int, list[str]]) -> np.ndarray:
    """For each picture (N, 10): n-grams that are found, n-grams, for n from 1 to 4; words, words of the references."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    counts = []
    for place in said:
        scorer = BleuScorer(n=ORDERS)
        scorer += (said[place][0], people[place])
        found = scorer.ctest[0]
        words = min((abs(length - found["testlen"]), length) for length in found["reflen"])[1]
        counts.append([*found["correct"], *found["guess"], found["testlen"], words])
    return np.array(counts, dtype=float)


def bleu(sums: np.ndarray, order: int) -> np.ndarray:
    """Corpus BLEU (Papineni et al. 2002) in points, of sums (..., 10) of `bleu_counts`; closest reference length."""
    found, all_of = sums[..., :order], sums[..., ORDERS : ORDERS + order]
    precision = np.prod((found + TINY) / (all_of + SMALL), axis=-1) ** (1 / order)
    lengths = (sums[..., -2] + TINY) / (sums[..., -1] + SMALL)
    return 100 * precision * np.where(lengths < 1, np.exp(1 - 1 / lengths), 1.0)


def rouge_l(said: dict[int, list[str]], people: dict[int, list[str]]) -> np.ndarray:
    """ROUGE-L of each picture (N,), from 0 to 1 (Lin 2004; F with beta 1.2, the best of the references)."""
    from pycocoevalcap.rouge.rouge import Rouge

    return np.asarray(Rouge().compute_score(people, said)[1])


def _meteor(items: Sequence[Item], said: dict[int, list[str]], people: dict[int, list[str]]) -> Measure:
    """METEOR (Denkowski and Lavie 2014) of the corpus; its interval is that of the mean over pictures, moved there."""
    from pycocoevalcap.meteor.meteor import Meteor

    try:
        of_corpus, of_pictures = Meteor().compute_score(people, said)
    except (ValueError, OSError) as error:
        raise DataError(
            f"METEOR's Java program failed ({error}); it is left out where no java is on the PATH"
        ) from error
    values = 100 * np.asarray(of_pictures)
    names, sums = grouped([item.group for item in items], np.stack([values, np.ones(len(values))], -1))
    moved = 100 * float(of_corpus) - float(values.mean())
    return Measure("METEOR", names, sums, lambda s: ratio(s) + moved, len(items), unit="points")
