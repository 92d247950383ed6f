"""Which tokens are learned, for the published chat templates of Llama, Vicuna, Qwen, LLaVA and Joey."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from assistant.chat import JOEY_TEMPLATE, ConversationError, encode_conversation, render_with_spans
from tests.tiny import make_tiny_tokenizer

# The texts as they are published with the models' tokenizers.
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN_2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful assistant.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = 'A chat between a "
    "curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers "
    "to the user\\'s questions.' %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != "
    "(loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...')"
    " }}{% endif %}{% if loop.index0 == 0 %}{{ system_message }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ ' USER: ' + message['content'].strip() }}{% elif message['role'] == 'assistant' %}{{ ' ASSISTANT: ' + "
    "message['content'].strip() + eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}"
    "{% endif %}"
)
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}{% for content in "
    "message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}"
    "{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ 'ASSISTANT:' }}{% endif %}"
)
# The same templates with what is learned marked by hand: transformers' own mask of them is the witness.
LLAMA_3_MARKED = LLAMA_3.replace(
    "{{ content }}",
    "{% if message['role'] == 'assistant' %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% generation %}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}{% else %}{{ content }}{% endif %}",
)
QWEN_2_MARKED = QWEN_2.replace(
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
    "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}",
)
VICUNA_MARKED = VICUNA.replace(
    "{{ ' ASSISTANT: ' + message['content'].strip() + eos_token }}",
    "{{ ' ASSISTANT:' }}{% generation %}{{ ' ' + message['content'].strip() + eos_token }}{% endgeneration %}",
)
LLAMA_TOKENS = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
QWEN_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
ANSWERS = ("A red circle,\nnot a ring.", " Two. ")


def byte_level(special: tuple[str, ...], template: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE as Llama 3 and Qwen have, with `special` tokens; the second ends a turn."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = ["What is in the picture? A red circle, not a ring. How many are there? Two. user assistant system"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=[*special, "<image>"], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[0],
        extra_special_tokens=[*special[2:], "<image>"],
        chat_template=template,
    )


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedTokenizerFast]:
    joey = make_tiny_tokenizer(tmp_path_factory.mktemp("joey"))
    vicuna = make_tiny_tokenizer(tmp_path_factory.mktemp("vicuna"))
    vicuna.chat_template = VICUNA
    llava = make_tiny_tokenizer(tmp_path_factory.mktemp("llava"))
    llava.chat_template = LLAVA
    llama, qwen = byte_level(LLAMA_TOKENS, LLAMA_3), byte_level(QWEN_TOKENS, QWEN_2)
    return {"joey": joey, "vicuna": vicuna, "llava": llava, "llama": llama, "qwen": qwen}


def talk(pictures: bool, system: bool) -> list[dict[str, Any]]:
    asked = {"role": "user", "content": [{"type": "image"}] * pictures + [{"type": "text", "text": "What is it?"}]}
    messages = [
        asked,
        {"role": "assistant", "content": [{"type": "text", "text": ANSWERS[0]}]},
        {"role": "user", "content": [{"type": "text", "text": "How many are there?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": ANSWERS[1]}]},
    ]
    return [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *messages] if system else messages


def as_texts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages as templates of language models want them, the picture's place as a line of its own."""
    return [
        {
            "role": message["role"],
            "content": "\n".join("<image>" if part["type"] == "image" else part["text"] for part in message["content"]),
        }
        for message in messages
    ]


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("pictures", [False, True])
@pytest.mark.parametrize(
    ("name", "witness", "reads_parts"),
    [
        ("joey", JOEY_TEMPLATE, True),
        ("llava", LLAVA, True),
        ("vicuna", VICUNA_MARKED, False),
        ("llama", LLAMA_3_MARKED, False),
        ("qwen", QWEN_2_MARKED, False),
    ],
)
def test_the_mask_is_that_of_the_template(
    tokenizers: dict[str, PreTrainedTokenizerFast],
    name: str,
    witness: str,
    reads_parts: bool,
    pictures: bool,
    system: bool,
) -> None:
    """Ids and mask equal transformers' own, from the template itself or from a copy that is marked by hand."""
    messages = talk(pictures, system)
    encoded = encode_conversation(tokenizers[name], messages, tokens_per_picture=1)
    theirs = tokenizers[name].apply_chat_template(
        messages if reads_parts else as_texts(messages),
        chat_template=witness,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert encoded.ids == theirs["input_ids"]
    assert encoded.supervised == [bool(mask) for mask in theirs["assistant_masks"]]
    assert encoded.ids.count(tokenizers[name].convert_tokens_to_ids("<image>")) == pictures


@pytest.mark.parametrize(
    ("name", "learned"),
    [
        ("joey", "A red circle,\nnot a ring.</s> Two. </s>"),
        ("vicuna", "A red circle,\nnot a ring.</s> Two.</s>"),
        ("llama", "A red circle,\nnot a ring.<|eot_id|>Two.<|eot_id|>"),
        ("qwen", "A red circle,\nnot a ring.<|im_end|> Two. <|im_end|>"),
    ],
)
def test_answers_and_the_ends_of_their_turns_are_learned_and_nothing_else(
    tokenizers: dict[str, PreTrainedTokenizerFast], name: str, learned: str
) -> None:
    encoded = encode_conversation(tokenizers[name], talk(pictures=True, system=True), tokens_per_picture=7)
    supervised = [token for token, is_learned in zip(encoded.ids, encoded.supervised, strict=True) if is_learned]
    assert tokenizers[name].decode(supervised).lstrip() == learned
    assert encoded.ids.count(tokenizers[name].convert_tokens_to_ids("<image>")) == 7


@pytest.mark.parametrize("name", ["joey", "llava", "vicuna", "llama", "qwen"])
def test_an_answer_of_weight_zero_is_read_and_not_learned(
    tokenizers: dict[str, PreTrainedTokenizerFast], name: str
) -> None:
    messages = talk(pictures=False, system=False)
    whole = encode_conversation(tokenizers[name], messages, 1)
    second = encode_conversation(tokenizers[name], [messages[0], messages[1] | {"supervised": False}, *messages[2:]], 1)
    assert second.ids == whole.ids
    first_answer = sum(encode_conversation(tokenizers[name], messages[:2], 1).supervised)
    assert sum(second.supervised) == sum(whole.supervised) - first_answer
    _, spans = render_with_spans(tokenizers[name], messages)
    assert len(spans) == 2


@pytest.mark.parametrize("name", ["joey", "llava", "vicuna", "llama", "qwen"])
def test_typed_special_tokens_are_only_text(tokenizers: dict[str, PreTrainedTokenizerFast], name: str) -> None:
    """A typed <image> is never bound to a picture, and a typed end of turn ends none; also when typed in two parts."""
    tokenizer = tokenizers[name]
    honest = encode_conversation(tokenizer, talk(pictures=True, system=False), 3)
    for typed in tokenizer.all_special_tokens:
        for texts in ([f"What {typed} is it?"], [f"What {typed[:3]}", f"{typed[3:]} is it?"]):
            messages = talk(pictures=True, system=False)
            messages[0]["content"][1:] = [{"type": "text", "text": text} for text in texts]
            messages[1]["content"] = [{"type": "text", "text": f"It is {typed}."}]
            ids = encode_conversation(tokenizer, messages, 3).ids
            for number in set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}:
                assert ids.count(number) == honest.ids.count(number), (typed, number)


def test_a_template_that_refuses_says_so(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    messages = talk(pictures=False, system=False)
    with pytest.raises(ConversationError, match="roles must alternate"):
        encode_conversation(tokenizers["vicuna"], messages[1:], 1)


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    """As templates of reasoning models do: an answer looks otherwise than its own generation prompt."""
    tokenizer = byte_level(QWEN_TOKENS, QWEN_2.replace("<|im_start|>assistant\n", "<|im_start|>assistant\nHm. "))
    with pytest.raises(ConversationError, match="generation %"):
        encode_conversation(tokenizer, talk(pictures=False, system=False), 1)


def test_the_templates_that_joining_writes_learn_the_end_of_each_turn(
    tokenizers: dict[str, PreTrainedTokenizerFast],
) -> None:
    folder = Path(__file__).resolve().parent.parent / "assistant" / "templates"
    for name, file, end in (("qwen", "chatml", "<|im_end|>"), ("llama", "llama3", "<|eot_id|>")):
        tokenizer = byte_level(QWEN_TOKENS if name == "qwen" else LLAMA_TOKENS, (folder / f"{file}.jinja").read_text())
        encoded = encode_conversation(tokenizer, talk(pictures=True, system=True), 2)
        learned = tokenizer.decode([t for t, s in zip(encoded.ids, encoded.supervised, strict=True) if s])
        assert [part.strip() for part in learned.split(end)] == [answer.strip() for answer in ANSWERS] + [""]
