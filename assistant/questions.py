"""The words that ask for a caption in one style or another, and what makes an alternative text of the answer."""

import re
from dataclasses import dataclass
from typing import Literal

CAPTION_QUESTION = "Describe this picture in one sentence."

CaptionStyle = Literal["short", "detailed", "alt_text"]


@dataclass(frozen=True)
class CaptionWords:
    """How a style is asked for, and after how many tokens its answer is cut off."""

    question: str
    max_tokens: int


CAPTION_STYLES: dict[CaptionStyle, CaptionWords] = {
    "short": CaptionWords(CAPTION_QUESTION, 64),
    "detailed": CaptionWords("Describe this picture in detail.", 256),
    "alt_text": CaptionWords(CAPTION_QUESTION, 64),
}

# A screen reader says that it is an image before it reads the alternative text (WCAG 2.2, technique G94; HTML,
# section 4.8.4.4.1), so the text must not say so again.
SAYS_IT_IS_A_PICTURE = re.compile(
    r"^(?:this is |there is |here is )?(?:an?|the) (?:picture|image|photo|photograph)(?: of| showing| that shows) ",
    re.IGNORECASE,
)


def tidied(text: str, style: CaptionStyle) -> str:
    """The model's answer on one line, for `alt_text` without "A picture of" before it."""
    line = " ".join(text.split())
    if style != "alt_text":
        return line
    rest = SAYS_IT_IS_A_PICTURE.sub("", line)
    return rest[:1].upper() + rest[1:]
