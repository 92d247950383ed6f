"""Keep what people type plain text: no typed word may act as one of the model's special tokens."""

import re

from tokenizers import Tokenizer


class SpecialTextError(ValueError):
    """A text that would still act as a special token after it was taken apart."""


class PlainText:
    """Takes special tokens in typed text apart with a space after their first character: `<image>` -> `< image>`.

    The change is visible on purpose: the person sees in the model's answers what the model read. Without it a typed
    `<image>` draws the picture to where it was typed, and a typed end-of-turn token speaks in another's name.
    """

    def __init__(self, tokenizer: Tokenizer, picture_token: str | None = None) -> None:
        self._tokenizer = tokenizer
        added = self._tokenizer.get_added_tokens_decoder()
        special = {number: token.content for number, token in added.items() if token.special}
        special |= {number: token.content for number, token in added.items() if token.content == picture_token}
        # The token for unknown characters has no power, and honest texts may hold such characters.
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        self._ids = {number for number, content in special.items() if content != unknown}
        longest_first = sorted(special.values(), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if special else None

    def __call__(self, text: str) -> str:
        """The text with every special token taken apart.

        Raises:
            SpecialTextError: a special token is left (a tokenizer may read other letters as the same token).
        """
        if self._pattern is None:
            return text
        plain = self._pattern.sub(lambda match: match[0][:1] + " " + match[0][1:], text)
        # The tokenizer has the last word, whatever its rules for letter case, widths of letters or spaces are.
        if self._ids.intersection(self._tokenizer.encode(plain, add_special_tokens=False).ids):
            raise SpecialTextError("the text holds a control token of the model; remove it and send it again")
        return plain
