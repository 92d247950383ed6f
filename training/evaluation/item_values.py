"""How well each single question was answered: what a page sorts and marks by."""

from collections.abc import Mapping, Sequence

from training.evaluation.answer_measures import right_verdicts, right_words
from training.evaluation.captions import scorers, tokenised
from training.evaluation.likelihood_measures import chosen
from training.evaluation.predictions import Prediction
from training.evaluation.task import Task
from training.evaluation.task_items import Item
from training.evaluation.verdicts import VERDICTS
from training.evaluation.vqa import vqa_accuracy


def item_values(task: Task, items: Sequence[Item], predictions: Mapping[str, Prediction]) -> list[float]:
    """A number for each of `items`, higher where it is answered better.

    1 or 0 for right or wrong; VQA's share; CIDEr of a caption; the mean log-likelihood of a text's tokens.
    """
    those = [predictions[item.id] for item in items]
    if task.kind == "choices":
        pairs = zip(items, those, strict=True)
        return [float(item.choices[chosen(one, by_token=True)] == item.expected[0]) for item, one in pairs]
    if task.kind == "perplexity":
        return [sum(one.likelihoods or ()) / sum(one.tokens or ()) for one in those]
    answers = [one.answer or "" for one in those]
    if task.kind in VERDICTS:
        return right_verdicts(items, answers, task.kind).tolist()
    if task.kind == "vqa":
        return [vqa_accuracy(answer, item.expected) for item, answer in zip(items, answers, strict=True)]
    if task.kind == "words":
        return right_words(items, answers).tolist()
    people = {place: [tokenised(one) for one in item.expected] for place, item in enumerate(items)}
    said = {place: [tokenised(answer)] for place, answer in enumerate(answers)}
    return [100 * float(value) for value in scorers()[1].compute_score(people, said)[1]]
