"""All scores that a task's kind has, of predictions, with what is said beside them."""

from collections.abc import Mapping, Sequence

from training.evaluation.answer_measures import true_false_measures, vqa_measures, words_measures, yes_no_measures
from training.evaluation.caption_measures import NO_METEOR, caption_measures, has_java
from training.evaluation.likelihood_measures import choices_measures, perplexity_measures
from training.evaluation.predictions import Prediction, PredictionError
from training.evaluation.resampling import Measure
from training.evaluation.task import Task
from training.evaluation.task_items import Item

OF_ANSWERS = {
    "captions": caption_measures,
    "words": words_measures,
    "vqa": vqa_measures,
    "yes_no": yes_no_measures,
    "true_false": true_false_measures,
}
OF_LIKELIHOODS = {"choices": choices_measures, "perplexity": perplexity_measures}


def score_task(task: Task, items: Sequence[Item], predictions: Mapping[str, Prediction]) -> list[Measure]:
    """The scores of `items`, each of which has a prediction.

    Raises:
        PredictionError: there is nothing to score, or a prediction is not of the task's kind.
        ImportError: captions, and the package `pycocoevalcap` is not installed.
    """
    if not items:
        raise PredictionError("no question is answered, so there is nothing to score")
    those = [predictions[item.id] for item in items]
    for item, prediction in zip(items, those, strict=True):
        check_prediction(task, item, prediction)
    if task.by_likelihood:
        return list(OF_LIKELIHOODS[task.kind](items, those))
    return list(OF_ANSWERS[task.kind](items, [one.answer or "" for one in those]))


def check_prediction(task: Task, item: Item, prediction: Prediction) -> None:
    """Raises PredictionError where `prediction` lacks what the task's kind scores."""
    if not task.by_likelihood:
        if prediction.answer is None:
            raise PredictionError(f"the prediction for {item.id} has no answer, which a task of {task.kind} scores")
        return
    wanted = len(item.choices) or 1
    likelihoods, tokens = prediction.likelihoods or (), prediction.tokens or ()
    if len(likelihoods) != wanted or len(tokens) != wanted or min(tokens, default=0) < 1:
        raise PredictionError(
            f"the prediction for {item.id} needs {wanted} likelihoods, and as many counts of tokens, to be scored"
        )


def notes_of(task: Task) -> list[str]:
    """What a reader of the scores has to know."""
    return [NO_METEOR] if task.kind == "captions" and not has_java() else []
