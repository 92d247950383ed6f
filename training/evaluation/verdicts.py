"""Reads yes or no, true or false out of an answer."""

import re
from collections.abc import Mapping

# The word that is meant by each first word of an answer, for each kind of task; the first is the positive one.
VERDICTS: Mapping[str, Mapping[str, str]] = {
    "yes_no": {"yes": "yes", "no": "no"},
    "true_false": {"true": "true", "false": "false", "yes": "true", "no": "false"},
}


def verdict_of(answer: str, kind: str) -> str | None:
    """The verdict that `answer` opens with, whatever its case and punctuation, or None where it opens with neither.

    "Yes, there is a dog." is yes. We deviate from POPE's script, which takes every answer without a no for a yes: an
    answer that is neither is wrong here, and how many there are is told.
    """
    first = re.search(r"\w+", answer.lower())
    return VERDICTS[kind].get(first.group()) if first else None
