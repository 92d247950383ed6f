"""What a task file may say: what is asked, of which data, and how answers are scored."""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from training.data.scene_facts import SceneKind
from training.strict import Strict, faults_in

TASKS = Path(__file__).parent / "tasks"
TaskKind = Literal["captions", "words", "vqa", "choices", "yes_no", "true_false", "perplexity"]
BY_LIKELIHOOD: tuple[TaskKind, ...] = ("choices", "perplexity")  # nothing is generated: the model weighs given texts
QUESTION_PLACE = "{question}"


class TaskError(ValueError):
    """A task that cannot be measured; the message names the file and the field."""


class TaskData(Strict):
    """Where a task's questions come from: shards of the data folder, a file of one's own, or generated scenes."""

    shards: tuple[str, ...] = Field((), description="names of picture shards, such as coco-validation")
    file: str | None = Field(
        None, description="rows of one's own, .jsonl or .csv; a relative path counts from the task file's folder"
    )
    scenes: int | None = Field(None, ge=1, description="how many generated scenes; training never sees them")
    kinds: tuple[SceneKind, ...] = Field((), description="scenes of these kinds only, all as often")
    texts: str | None = Field(None, description="name of a text shard, such as text-train")
    text_source: str | None = Field(None, description="rows whose column `source` says so; all where unset")
    limit: int | None = Field(
        None, ge=1, description="at most so many, the first: pictures of each shard, rows of the file, scenes or texts"
    )

    @model_validator(mode="after")
    def _one_source(self) -> "TaskData":
        named = [kind for kind in ("shards", "file", "scenes", "texts") if getattr(self, kind)]
        if len(named) != 1:
            raise ValueError(f"name one of shards, file, scenes, texts, not {' and '.join(named) or 'none'}")
        if self.kinds and not self.scenes:
            raise ValueError(f"kinds are said of scenes only, not of {named[0]}")
        if self.text_source is not None and not self.texts:
            raise ValueError(f"text_source is said of texts only, not of {named[0]}")
        return self


class Task(Strict):
    """One task. Scores of the kinds: see `task_scores`."""

    about: str = Field(description="what is measured, for people")
    kind: TaskKind = Field(
        description="captions: BLEU, ROUGE-L, CIDEr, METEOR. words: the very answer. vqa: VQA v2's accuracy among "
        "people's answers. choices: the likeliest choice. yes_no: precision and recall too. true_false: NLVR's "
        "consistency too. perplexity: of plain text"
    )
    data: TaskData
    question: str | None = Field(
        None, min_length=1, description="asked of every picture; where unset, each row's own (or for a caption)"
    )
    prompt: str = Field(
        QUESTION_PLACE, description="what is sent, with {question} in it. Example: '{question} Answer yes or no.'"
    )
    max_tokens: int = Field(32, ge=1, le=4096, description="an answer is cut off after so many tokens")

    @model_validator(mode="after")
    def _fits(self) -> "Task":
        if QUESTION_PLACE not in self.prompt:
            raise ValueError(f"prompt: {QUESTION_PLACE} does not stand in it, so no question would be asked")
        if bool(self.data.texts) and self.kind != "perplexity":
            raise ValueError(f"data.texts: texts are for the kind perplexity, not for {self.kind}")
        if self.kind == "perplexity" and (self.data.shards or self.data.scenes):
            raise ValueError("data: perplexity is of texts, or of a file whose rows have a text")
        return self

    @property
    def by_likelihood(self) -> bool:
        """Whether the model weighs given texts, and generates none."""
        return self.kind in BY_LIKELIHOOD


def shipped_tasks() -> list[str]:
    """The names of the tasks that come along."""
    return sorted(file.stem for file in TASKS.glob("*.yaml"))


def task_file(name: str) -> Path:
    """The file of the task `name`: a path that ends in .yaml, or a shipped task. Raises TaskError naming those."""
    file = Path(name).expanduser() if name.endswith((".yaml", ".yml")) else TASKS / f"{name}.yaml"
    if not file.is_file():
        raise TaskError(f"there is no task {name}; the shipped ones are {', '.join(shipped_tasks())}, or name a .yaml")
    return file


def read_task(file: Path) -> Task:
    """The task in `file`. Raises TaskError naming the file and every field that does not fit."""
    try:
        content: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
        return Task.model_validate(content)
    except UnicodeDecodeError as error:
        raise TaskError(f"{file} is not UTF-8: {error}") from error
    except yaml.YAMLError as error:
        raise TaskError(f"{file} is not YAML: {error}") from error
    except ValidationError as error:
        raise TaskError(f"{file}: {faults_in(error, 'the task')}") from error
