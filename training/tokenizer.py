"""Train a sentencepiece tokenizer and export it as a fast tokenizer with Joey's chat template."""

from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from assistant.chat import BEGIN_TOKEN, END_TOKEN, JOEY_TEMPLATE, PAD_TOKEN, SPECIAL_TOKENS, UNKNOWN_TOKEN

SPACE = "\u2581"  # how sentencepiece writes a space


def train_sentencepiece(texts: Iterable[str], vocabulary: int, model_file: Path) -> None:
    """Train byte-pair encoding with byte fallback on `texts` and write `model_file` (.model).

    Words start with a space or not as written (no dummy prefix) and nothing is normalised away, so decoding gives the
    text back to the byte. Digits stand alone, which makes counting and arithmetic easier to learn.
    """
    model_file.parent.mkdir(parents=True, exist_ok=True)
    # Read all before: sentencepiece turns what goes wrong while it reads, Ctrl-C too, into an error of its own.
    lines = [line for text in texts for line in text.split("\n") if line.strip()]
    with model_file.open("wb") as sink:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=sink,
            vocab_size=vocabulary,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.9995,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=8192,
            num_threads=2,
            minloglevel=1,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece=PAD_TOKEN,
            bos_piece=BEGIN_TOKEN,
            eos_piece=END_TOKEN,
            unk_piece=UNKNOWN_TOKEN,
            control_symbols=[t for t in SPECIAL_TOKENS if t not in (PAD_TOKEN, BEGIN_TOKEN, END_TOKEN)],
        )


def merges_of(pieces: dict[str, int]) -> list[tuple[str, str]]:
    """The merges of a BPE vocabulary in the order sentencepiece applies them.

    sentencepiece merges the pair whose result has the best score, and scores fall with the piece's id; a piece that
    can be made in several ways therefore ranks all of them alike, and the pair order inside one piece is immaterial.
    """
    merges = []
    for piece, rank in pieces.items():
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [(left, right) for left, right in splits if left in pieces and right in pieces]
        merges += [(rank, pieces[left], pieces[right], (left, right)) for left, right in known]
    return [pair for *_, pair in sorted(merges)]


def fast_tokenizer(model_file: Path, max_length: int) -> PreTrainedTokenizerFast:
    """The same segmentation as `model_file` as a fast tokenizer, with special tokens and Joey's chat template."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    vocabulary = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    ordinary = {
        piece: i
        for piece, i in vocabulary.items()
        if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i))
    }
    tokenizer = Tokenizer(
        BPE(vocabulary, merges_of(ordinary), unk_token=UNKNOWN_TOKEN, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN_TOKEN,
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        unk_token=UNKNOWN_TOKEN,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    fast.chat_template = JOEY_TEMPLATE
    return fast
