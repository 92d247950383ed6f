"""Judge answers about pictures with a trained reward model: a number for each, higher for the better one."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from assistant.chat import assistant_message, user_message
from assistant.checkpoint import load_llava
from assistant.models import ModelError, find_model
from assistant.pixels import pixels_of
from assistant.projectors import Llava
from assistant.tiles import Processor
from assistant.tower_shapes import output_side
from training.data.views import square
from training.lessons import Lesson
from training.preference_sets import answer_rows

HEAD = "reward_head.safetensors"  # beside the model's weights
HEAD_WEIGHT = "score.weight"  # (1, width), as transformers calls the head of a sequence classifier
LONGEST = 2048  # tokens of a question with its answer


def answer_ends(completion_mask: Tensor) -> Tensor:
    """(B,) the place of the last token of each row's answer, from its mask (B, T)."""
    places = torch.arange(completion_mask.shape[1], device=completion_mask.device)
    return (completion_mask * places).argmax(dim=1)


class RewardModel:
    """A LLaVA with a head of one number."""

    def __init__(self, model: Llava, processor: Processor, head: Tensor) -> None:
        """`head` is (1, width)."""
        self.model, self.processor, self.head = model.eval(), processor, head.to(model.device)

    @classmethod
    def load(cls, folder: Path) -> "RewardModel":
        """Raises ModelError where the folder is no model, or has no head."""
        model, processor = load_llava(find_model(folder))
        if not (folder / HEAD).is_file():
            raise ModelError(f"{folder} is no reward model: it lacks {HEAD}; kangaroo reward trains one")
        head = load_file(folder / HEAD)[HEAD_WEIGHT]
        return cls(model.to("cuda" if torch.cuda.is_available() else "cpu"), processor, head)

    def rewards(self, question: str, answers: Sequence[str], picture: Image.Image) -> list[float]:
        """The number of each of `answers` to `question` about `picture`, which is RGB."""
        view = square(pixels_of(picture), output_side(self.processor.image_processor))
        lessons = [
            Lesson(answer, (view,), (), messages=(user_message(question, 1), assistant_message(answer)))
            for answer in answers
        ]
        batch = answer_rows(lessons, self.processor, LONGEST)
        seen = {name: value.to(self.model.device) for name, value in batch.items() if name != "completion_mask"}
        with torch.inference_mode():
            hidden = self.model.model(**seen).last_hidden_state
            last = hidden[torch.arange(len(hidden)), answer_ends(batch["completion_mask"]).to(hidden.device)]
            return (last.float() @ self.head.T).squeeze(-1).tolist()
