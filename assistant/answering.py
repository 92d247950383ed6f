"""Answer in one process, with transformers: ask, caption, stream; no server needed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import torch
from PIL import Image
from transformers import TextIteratorStreamer

from assistant.chat import user_message
from assistant.checkpoint import load_llava
from assistant.models import find_model
from assistant.projectors import Llava
from assistant.tiles import Processor


@dataclass(frozen=True)
class Request:
    """One question about no, one or several pictures (RGB)."""

    question: str
    pictures: tuple[Image.Image, ...] = ()


class Assistant:
    """A loaded model that answers requests, greedily."""

    def __init__(self, model: Llava, processor: Processor) -> None:
        self.model = model.eval()
        self.processor = processor
        processor.tokenizer.padding_side = "left"  # so that every row of a batch ends where its answer begins

    @classmethod
    def load(cls, model: str | Path | None = None, dtype: torch.dtype = torch.float32) -> "Assistant":
        """Joey where `model` is None, else a folder or a hub name. Raises ModelError when it cannot be had."""
        loaded, processor = load_llava(find_model(model), dtype)
        return cls(loaded.to("cuda" if torch.cuda.is_available() else "cpu"), processor)

    def answer_batch(self, requests: Sequence[Request], max_new_tokens: int = 64) -> list[str]:
        """The answers to `requests`, all generated at once."""
        inputs = self.inputs(requests)
        with torch.inference_mode():
            ids = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers = self.processor.tokenizer.batch_decode(
            ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return [answer.strip() for answer in answers]

    def stream(self, request: Request, max_new_tokens: int = 256) -> Iterator[str]:
        """The answer to `request`, piece by piece as it is generated. An error of the model is raised here."""
        inputs = self.inputs([request])
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failures: list[BaseException] = []

        def generate() -> None:
            try:
                with torch.inference_mode():
                    self.model.generate(**inputs, streamer=streamer, max_new_tokens=max_new_tokens, do_sample=False)
            except BaseException as error:  # noqa: BLE001 - handed over to the thread that reads
                failures.append(error)
                streamer.end()

        thread = Thread(target=generate, daemon=True)
        thread.start()
        yield from streamer
        thread.join()
        if failures:
            raise failures[0]

    def inputs(self, requests: Sequence[Request]) -> dict[str, torch.Tensor]:
        """What the model reads of `requests`, in rows of one length, on its device."""
        template = self.processor.chat_template
        prompts = [
            self.processor.apply_chat_template(
                [user_message(request.question, len(request.pictures))],
                chat_template=template,
                add_generation_prompt=True,
                tokenize=False,
            )
            for request in requests
        ]
        pictures = [picture for request in requests for picture in request.pictures]
        inputs = self.processor(
            text=prompts,
            images=pictures or None,
            return_tensors="pt",
            padding=True,
            add_special_tokens=False,  # the template writes the begin token
        )
        return inputs.to(self.model.device)
