"""Say what a conversation becomes for one model: its tokens, which of them are learned, and whether it fits."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import AutoConfig

from assistant.chat import (
    IMAGE_TOKEN,
    ConversationError,
    EncodedConversation,
    assistant_message,
    encode_conversation,
    plain_text_of,
    render_with_spans,
)
from assistant.checkpoint import load_processor
from assistant.models import find_model
from assistant.tiles import Processor, Size, is_tiled, most_tokens_per_picture, tokens_per_picture
from assistant.tower_shapes import output_side
from training.data.conversations import Conversation, Fault, PictureReference, RowError

NO_LIMIT = 1_000_000  # tokens; tokenizers that state no limit state a huge number


@dataclass(frozen=True)
class Piece:
    """A stretch of the text that the model reads: learned or only read, or a picture's place."""

    text: str
    supervised: bool
    is_picture: bool = False


class LessonJudge:
    """Encodes conversations as training does, with a model's own template."""

    def __init__(self, processor: Processor, longest: int) -> None:
        """`longest` is how many tokens a conversation may have."""
        self.processor, self.tokenizer, self.longest = processor, processor.tokenizer, longest
        self.per_picture = most_tokens_per_picture(processor)
        self.side = output_side(processor.image_processor)
        self.view_side = None if is_tiled(processor) else self.side  # None: the picture as it is, to be cut into tiles
        self.ending = {self.tokenizer.eos_token_id, *self.tokenizer.all_special_ids}

    def encode(self, conversation: Conversation, sizes: Sequence[Size | None]) -> EncodedConversation:
        """Its tokens, with pictures of those `sizes`; one of a size that nobody knows counts as a small square.

        Raises RowError where it cannot be taught to this model.
        """
        square = self.side, self.side
        counts = [tokens_per_picture(self.processor, size or square) for size in sizes]
        try:
            encoded = encode_conversation(self.tokenizer, conversation.chat_messages(), counts)
        except ConversationError as error:
            way_out = "mend the row, or take another model's template"
            raise RowError("refused by the template", "messages", str(error), way_out) from error
        if len(encoded.ids) > self.longest:
            each = " + ".join(f"{counts.count(count)} x {count}" for count in sorted(set(counts))) or "none"
            wrong = f"{len(encoded.ids):,} tokens ({each} for pictures), over {self.longest:,}"
            raise RowError("too long", "messages", wrong, "shorten it, or split it into several rows")
        return encoded

    def remarks(self, conversation: Conversation) -> list[Fault]:
        """What is told of it and taught all the same."""
        plain, found = plain_text_of(self.tokenizer), []
        for message in conversation.messages:
            if plain(message.text) != message.text:
                wrong = "a special token of the model is typed; it is read as plain text with a space in it"
                found.append(Fault("typed special token", message.field, wrong, "leave it, or write it in another way"))
        return [*conversation.remarks, *found]

    def pieces(self, encoded: EncodedConversation) -> list[Piece]:
        """The text of `encoded` in stretches, to be shown; a picture's tokens are one stretch."""
        image = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        pieces: list[Piece] = []
        ids: list[int] = []
        before = ""
        last: tuple[bool, bool] | None = None
        counts = iter(encoded.pictures)
        rest = 0  # tokens of the picture that is being passed
        for token, supervised in zip(encoded.ids, encoded.supervised, strict=True):
            if token == image and rest:
                rest -= 1
                continue
            rest = next(counts) - 1 if token == image else 0
            ids.append(token)
            now = self.tokenizer.decode(ids)
            kind = (supervised, token == image)
            # By difference: a token alone may be half a character, or lose the space before it.
            if kind == last and token != image:
                pieces[-1] = Piece(pieces[-1].text + now[len(before) :], supervised)
            else:
                pieces.append(Piece(now[len(before) :], *kind))
            before, last = now, kind
        return pieces

    def moves_pictures(self, conversation: Conversation) -> bool:
        """Whether a picture stands behind words of its message, and the template writes it before them."""
        behind = any(
            isinstance(part, PictureReference) and any(isinstance(earlier, str) for earlier in message.parts[:place])
            for message in conversation.messages
            for place, part in enumerate(message.parts)
        )
        return behind and not self._keeps_places

    @cached_property
    def _keeps_places(self) -> bool:
        asked = {"role": "user", "content": [{"type": "text", "text": "probe"}, {"type": "image"}]}
        text, _ = render_with_spans(self.tokenizer, [asked, assistant_message("probe")])
        return text.index("probe") < text.index(IMAGE_TOKEN)

    def learns_to_stop(self, encoded: EncodedConversation) -> bool:
        """Whether the end of the last answer is a token that ends turns, and is learned."""
        learned = [token for token, supervised in zip(encoded.ids, encoded.supervised, strict=True) if supervised]
        return learned[-1] in self.ending


def judge_for(model: str | None, longest: int | None = None) -> tuple[LessonJudge, str]:
    """What judges lessons for `model` (Joey where None), and the model's name. No weights are loaded.

    Raises ModelError when the model cannot be had.
    """
    folder: Path = find_model(model)
    processor = load_processor(folder)
    stated = int(processor.tokenizer.model_max_length)
    positions = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config().max_position_embeddings
    return LessonJudge(processor, longest or min(stated if stated < NO_LIMIT else positions, positions)), folder.name
