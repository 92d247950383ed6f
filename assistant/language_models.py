"""Load a language model that has never seen a picture, and make room in it for pictures."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import jinja2, render_jinja_template

from assistant.chat import IMAGE_TOKEN, PAD_TOKEN, user_message
from assistant.checkpoint import load_model
from assistant.exporting import require_unquantised
from assistant.fusion import LANGUAGE_MODELS
from assistant.models import PICKLED_WEIGHTS, ModelError, downloaded, local_folder, missing_weights

TEMPLATES = Path(__file__).parent / "templates"
# Which template a model speaks by the token that begins its turns; a model with none of them was taught with plain
# words, as Vicuna was.
TURN_TOKENS = {"<|im_start|>": "chatml", "<|start_header_id|>": "llama3"}
ROWS = 64  # word embeddings come in multiples of it where some are added, as in llava-hf's models


PICKLED_PATTERNS = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


def find_language_model(name: str | Path) -> Path:
    """The local folder of `name`, a folder or a model of the hub, that holds a language model and its tokenizer.

    Weights may be pickled, as Vicuna's are: they are read without running code.
    Raises ModelError when configuration, tokenizer or weights are missing, or the hub cannot be reached.
    """
    folder = local_folder(name)
    if missing_weights(folder) and not Path(name).expanduser().is_dir():
        folder = downloaded(str(name), PICKLED_PATTERNS)
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model")):
        missing.append("tokenizer.json")
    if not any((folder / file).is_file() for file in (PICKLED_WEIGHTS, f"{PICKLED_WEIGHTS}.index.json")):
        missing += missing_weights(folder)
    if missing:
        raise ModelError(f"the language model in {folder} lacks {', '.join(missing)}; export or copy it again")
    return folder


def load_language_model(
    source: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The language model and tokenizer of `source`, a folder or a hub name, with room for pictures.

    Raises ModelError where it cannot be found, is damaged, or is of no family that can be joined.
    """
    folder = find_language_model(source)
    require_unquantised(folder, "joined")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: the configuration cannot be read: {str(error).splitlines()[0]}") from error
    classes = {known.config_class: known for known in LANGUAGE_MODELS}
    if type(config) not in classes:
        known = ", ".join(sorted(known.model_type for known in classes))
        raise ModelError(
            f"{folder} holds a {config.model_type}, no language model that can be joined; these are: {known}"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = load_model(classes[type(config)], folder, dtype)
    make_room_for_pictures(model, tokenizer)
    return model, tokenizer


def make_room_for_pictures(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add in place what a language model without pictures lacks: a picture token, a padding token, a template for both.

    New rows of the embeddings start near the mean of the others, as transformers makes them.
    """
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    if len(tokenizer) > model.config.vocab_size:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=ROWS)
    if not takes_pictures(tokenizer):
        tokenizer.chat_template = (TEMPLATES / f"{template_name(tokenizer)}.jinja").read_text()


def template_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template in `templates/` that fits the turn tokens of `tokenizer`; LLaVA-1.5's where it has none."""
    words = tokenizer.get_added_vocab()
    return next((name for token, name in TURN_TOKENS.items() if token in words), "llava")


def takes_pictures(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template of `tokenizer` writes a picture's place and the words beside it."""
    if not tokenizer.chat_template:
        return False
    try:
        rendered, _ = render_jinja_template(
            [[user_message("probe", pictures=1)]],
            chat_template=tokenizer.chat_template,
            **tokenizer.special_tokens_map,
        )
    except (jinja2.TemplateError, TypeError):
        return False
    return rendered[0].count(IMAGE_TOKEN) == 1 and "probe" in rendered[0] and "'type'" not in rendered[0]
