"""VQA v2's accuracy: how answers are written alike, and how many of ten people have to say the same."""

import re
from collections.abc import Sequence

ENOUGH = 3  # who agree, for a full point
PUNCTUATION = (*r';/[]"{}()=+\_-><@`,?!',)
NUMBERS = "zero one two three four five six seven eight nine ten"
NUMBER_WORDS = {word: str(number) for number, word in enumerate(NUMBERS.split())} | {"none": "0"}
ARTICLES = ("a", "an", "the")
# What the official scorer writes with its apostrophes where one of them was left out.
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in CONTRACTED.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the one that it turns the other way round
STOP_BEFORE_WORDS = re.compile(r"(?!<=\d)\.(?!\d)")
COMMA_IN_NUMBER = re.compile(r"\d,\d")
STOPS_TAKEN = 32  # the official script passes a flag where the count of replacements stands, and the flag is 32


def vqa_normalised(answer: str) -> str:
    """The answer as the official scorer writes it: no punctuation, no articles, numbers to ten in digits, contractions.

    Its rules (of 2021) are kept with their quirks: a mark of punctuation becomes a space inside words and vanishes
    beside a space, everywhere in the answer, and also where a comma stands between digits; apostrophes and colons stay.
    """
    return _words_alike(_without_punctuation(answer.replace("\n", " ").replace("\t", " ").strip()))


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """The share, from 0 to 1, that VQA v2 gives to `answer` (Antol et al. 2015; Goyal et al. 2017).

    The mean over people of min(1, others who say the same / 3). We deviate from the official script twice. Where all
    people say the same it compares letters, so that "Yes." would be wrong beside ten times "yes": here answers are
    written alike always. And its formula never gives a full point with fewer than four people: there, as many others
    are needed as there are, and one person alone has to say the same.

    Raises ValueError where nobody answered.
    """
    if not people:
        raise ValueError("nobody answered, so there is nothing to compare with")
    said, people = vqa_normalised(answer), [vqa_normalised(one) for one in people]
    if len(people) == 1:
        return float(people[0] == said)
    agree = sum(one == said for one in people)
    needed = min(ENOUGH, len(people) - 1)
    shares = [min(1.0, (agree - (one == said)) / needed) for one in people]
    return sum(shares) / len(shares)


def _without_punctuation(text: str) -> str:
    has_number = COMMA_IN_NUMBER.search(text) is not None
    written = text
    for mark in PUNCTUATION:
        vanishes = has_number or f"{mark} " in text or f" {mark}" in text
        written = written.replace(mark, "" if vanishes else " ")
    return STOP_BEFORE_WORDS.sub("", written, count=STOPS_TAKEN)


def _words_alike(text: str) -> str:
    words = (NUMBER_WORDS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
