"""Puts a task's questions to a model here in the process, in batches."""

from collections.abc import Callable, Iterator, Sequence

from assistant.answering import Assistant, Request
from assistant.chat import ConversationError
from training.evaluation.likelihood import log_likelihoods, see, weigh_answer, weigh_text
from training.evaluation.predictions import Prediction
from training.evaluation.task_items import Item, TaskItems

WINDOW = 8  # batches within which questions are put in the order of their length, for the least padding

Keep = Callable[[Prediction], None]


class InProcess:
    """A loaded assistant that is asked `batch` questions at once."""

    def __init__(self, assistant: Assistant, batch: int) -> None:
        self.assistant, self.batch = assistant, batch

    def predict(self, asked: TaskItems, items: Sequence[Item], keep: Keep) -> None:
        """Answer `items`, each prediction handed to `keep` as soon as it is there. Raises DataError for a picture that
        cannot be read."""
        for some in _batches(items, self.batch):
            if asked.task.by_likelihood:
                self._weigh(asked, some, keep)
            else:
                self._answer(asked, some, keep)

    def _answer(self, asked: TaskItems, items: Sequence[Item], keep: Keep) -> None:
        requests = [
            Request(item.question, () if item.picture is None else (asked.pictures[item.picture],)) for item in items
        ]
        answers = self.assistant.answer_batch(requests, max_new_tokens=asked.task.max_tokens)
        for item, answer in zip(items, answers, strict=True):
            keep(Prediction(id=item.id, answer=answer))

    def _weigh(self, asked: TaskItems, items: Sequence[Item], keep: Keep) -> None:
        places = sorted({item.picture for item in items if item.picture is not None})
        seen = see(self.assistant, [asked.pictures[place] for place in places]) if places else []
        rows, owners = [], []
        for item in items:
            try:
                if item.picture is None:
                    weighed = [weigh_text(self.assistant, item.expected[0])]
                else:
                    at = places.index(item.picture)
                    tokens = len(seen[at])
                    weighed = [weigh_answer(self.assistant, item.question, one, at, tokens) for one in item.choices]
            except ConversationError as error:
                keep(Prediction(id=item.id, failed=str(error)))
                continue
            rows += weighed
            owners.append((item, len(weighed)))
        if not rows:
            return
        found = iter(log_likelihoods(self.assistant, rows, seen))
        for item, count in owners:
            pairs = [next(found) for _ in range(count)]
            likelihoods, counts = tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)
            keep(Prediction(id=item.id, likelihoods=likelihoods, tokens=counts))


def _batches(items: Sequence[Item], batch: int) -> Iterator[list[Item]]:
    """`items` in batches; neighbours share their picture, and within a window those of like length stand together."""
    for start in range(0, len(items), WINDOW * batch):
        window = sorted(items[start : start + WINDOW * batch], key=lambda item: len(item.question or item.expected[0]))
        for first in range(0, len(window), batch):
            yield window[first : first + batch]
