"""Judge answers about pictures with a trained reward model: a number for each, higher for the better one."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from assistant.chat import assistant_message, user_message
from assistant.checkpoint import load_llava
from assistant.models import ModelError, find_model
from assistant.pixels import pixels_of
from assistant.projectors import Llava
from assistant.tiles import Processor
from assistant.tower_shapes import output_side
from assistant.weight_files import write_weights
from training.data.views import square
from training.lessons import Lesson
from training.preference_sets import answer_rows

HEAD = "reward_head.safetensors"  # beside the model's weights
START = 4.0  # times the mean log-probability of an answer's tokens: fits pairs about scenes best before any training
LONGEST = 2048  # tokens of a question with its answer


def answer_ends(completion_mask: Tensor) -> Tensor:
    """(B,) the place of the last token of each row's answer, from its mask (B, T)."""
    places = torch.arange(completion_mask.shape[1], device=completion_mask.device)
    return (completion_mask * places).argmax(dim=1)


class RewardHead(nn.Module):
    """The number of an answer: how likely the language model finds it, and what the last token of its turn adds.

    The likelihood tells a true answer from a false one before anything is learned; a linear function alone of what a
    small model holds of the last token does not, and is slow to learn it. That function learns what likelihood lacks.
    """

    def __init__(self, width: int) -> None:
        """`width` is the language model's."""
        super().__init__()
        self.score = nn.Linear(width, 1, bias=False)  # called as transformers calls the head of a sequence classifier
        nn.init.zeros_(self.score.weight)
        self.likelihood = nn.Parameter(torch.tensor([START]))

    def forward(self, model: Llava, rows: Mapping[str, Tensor]) -> Tensor:
        """(B,) float32: the numbers of B conversations, as `answer_rows` makes them."""
        seen = {name: rows[name] for name in ("input_ids", "attention_mask", "pixel_values") if name in rows}
        hidden = model.model(**seen, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(hidden), device=hidden.device), answer_ends(rows["completion_mask"])]
        likely = mean_log_probabilities(model, hidden, rows["input_ids"], rows["completion_mask"])
        return self.score(last.to(self.score.weight.dtype)).squeeze(-1).float() + self.likelihood * likely

    def save(self, folder: Path) -> None:
        """Beside the weights of the model."""
        write_weights({name: value.float().cpu() for name, value in self.state_dict().items()}, folder / HEAD)

    @classmethod
    def load(cls, folder: Path, width: int) -> "RewardHead":
        """Raises ModelError where the folder has none, or one of another model."""
        if not (folder / HEAD).is_file():
            raise ModelError(f"{folder} is no reward model: it lacks {HEAD}; kangaroo reward trains one")
        head = cls(width)
        try:
            head.load_state_dict(load_file(folder / HEAD))
        except RuntimeError as error:
            raise ModelError(f"{folder / HEAD} does not fit this model; kangaroo reward trains one") from error
        return head


def mean_log_probabilities(model: Llava, hidden: Tensor, input_ids: Tensor, completion_mask: Tensor) -> Tensor:
    """(B,) float32: of the tokens of each row's answer, from what the model holds of all tokens (B, T, width)."""
    rows, places = completion_mask[:, 1:].nonzero(as_tuple=True)
    logits = model.lm_head(hidden[rows, places]).float()  # of answers alone: the rest would be the most of the memory
    said = logits.log_softmax(-1).gather(-1, input_ids[rows, places + 1, None]).squeeze(-1)
    total = torch.zeros(len(hidden), device=hidden.device).index_add(0, rows, said)
    return total / completion_mask[:, 1:].sum(dim=1).clamp_min(1)


class RewardModel:
    """A LLaVA with a head of one number."""

    def __init__(self, model: Llava, processor: Processor, head: RewardHead) -> None:
        self.model, self.processor, self.head = model.eval(), processor, head.to(model.device)

    @classmethod
    def load(cls, folder: Path) -> "RewardModel":
        """Raises ModelError where the folder is no model, or has no head."""
        model, processor = load_llava(find_model(folder))
        head = RewardHead.load(folder, int(model.config.text_config.hidden_size))
        return cls(model.to("cuda" if torch.cuda.is_available() else "cpu"), processor, head)

    def rewards(self, question: str, answers: Sequence[str], picture: Image.Image) -> list[float]:
        """The number of each of `answers` to `question` about `picture`, which is RGB."""
        view = square(pixels_of(picture), output_side(self.processor.image_processor))
        lessons = [
            Lesson(answer, (view,), (), messages=(user_message(question, 1), assistant_message(answer)))
            for answer in answers
        ]
        batch = answer_rows(lessons, self.processor, LONGEST)
        rows = {name: value.to(self.model.device) for name, value in batch.items()}
        with torch.inference_mode():
            return self.head(self.model, rows).tolist()
