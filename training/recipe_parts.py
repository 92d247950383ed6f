"""What stages of every kind say alike: how long they train, and where pictures, texts and conversations come from."""

from typing import Literal

from pydantic import Field, model_validator

from training.data.catalogue import Use
from training.data.scenes import LARGEST_SIDE, SMALLEST_SIDE, SceneKind
from training.strict import Strict


class Schedule(Strict):
    """How long and how fast a stage trains."""

    steps: int = Field(ge=1, description="optimiser steps")
    batch_size: int = Field(ge=1, description="samples a step and process, before accumulation")
    accumulation: int = Field(1, ge=1, description="batches a step")
    learning_rate: float = Field(gt=0, description="highest learning rate, reached after the warm-up")
    final_rate: float = Field(0.05, ge=0, le=1, description="share of the learning rate left at the end of the cosine")
    warmup_steps: int = Field(0, ge=0, description="steps from zero to the highest learning rate")
    weight_decay: float = Field(0.1, ge=0)
    final_weight_decay: float | None = Field(None, ge=0, description="where a cosine takes it; the same where unset")
    beta2: float = Field(0.98, gt=0, lt=1, description="AdamW's second moment")
    bf16: bool | None = Field(None, description="mixed precision; where unset, wherever it is fast")
    gradient_checkpointing: bool = Field(False, description="less memory, a third more time")
    compile: bool = Field(
        False, description="fuse what each layer does; needs a C++ compiler and a minute at the start"
    )
    workers: int = Field(0, ge=0, description="processes that load data beside the training one")
    log_every: int = Field(10, ge=1)
    evaluate_every: int = Field(500, ge=1)
    save_every: int = Field(100, ge=1)
    seed: int = Field(1, ge=0)
    on_nan: Literal["stop", "skip"] = Field(
        "stop", description="a loss or gradient that is not finite ends the run, or its step changes nothing"
    )
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = Field(
        "none", description="where the log goes beside log.jsonl; the package of that name has to be installed"
    )


class PictureSource(Strict):
    """One source of pictures. A relative path counts from the data folder."""

    shard: str | None = Field(None, description="name of the shards, such as flickr8k-train")
    scenes: int | None = Field(None, ge=1, description="how many different generated scenes")
    kinds: tuple[SceneKind, ...] = Field((), description="scenes of these kinds only, all as often")
    side: int | None = Field(
        None, ge=SMALLEST_SIDE, le=LARGEST_SIDE, description="pixels that scenes are drawn in; a view's where unset"
    )
    folder: str | None = Field(None, description="folder of pictures; names of sub-folders are labels")
    captions: str | None = Field(
        None, description="file of captions, .jsonl or .csv; its pictures count from its folder"
    )
    tars: str | None = Field(None, description="webdataset tars: a path, a glob, or braces such as a-{000..003}.tar")
    stream: bool = Field(
        False, description="read tars from start to end: for compressed ones, pipes, and slow disks; alone in a mixture"
    )
    dataset: str | None = Field(None, description="name on the Hugging Face hub; a local one begins with /, ~ or .")
    split: str = Field("train", description="split of the dataset")
    image_column: str = Field("image", description="column of the dataset that holds the pictures")
    text_column: str | None = Field(None, description="column of the dataset that holds a caption or a list of them")
    label_column: str | None = Field(None, description="column of the dataset that holds the label")
    use: Use = Field("captions", description="what is taught of a picture; pictures where no words are needed")
    weight: float = Field(gt=0, description="share of the samples, relative to the other sources")
    damaged: float = Field(0.01, ge=0, le=1, description="share that may be damaged and is skipped; 0 is strict")
    memory: float = Field(2.0, ge=0, description="GiB of decoded pixels kept in memory where there is no cache")
    cache: str | None = Field(None, description="folder where decoded pixels are kept from run to run")

    @model_validator(mode="after")
    def _one_source(self) -> "PictureSource":
        kinds = ("shard", "scenes", "folder", "captions", "tars", "dataset")
        named = [kind for kind in kinds if getattr(self, kind) is not None]
        if len(named) != 1:
            raise ValueError(f"name one of {', '.join(kinds)}, not {' and '.join(named) or 'none'}")
        columns = {"split", "image_column", "text_column", "label_column"} & self.model_fields_set
        if columns and self.dataset is None:
            raise ValueError(f"{', '.join(sorted(columns))} is said of a dataset only, not of a {named[0]}")
        if self.stream and self.tars is None:
            raise ValueError(f"only tars can be streamed, not a {named[0]}")
        if self.use == "questions" and named[0] not in ("shard", "scenes"):
            raise ValueError(f"a {named[0]} has no questions")
        if self.side is not None and self.scenes is None:
            raise ValueError(f"side is said of scenes only, not of a {named[0]}")
        if self.kinds and self.scenes is None:
            raise ValueError(f"kinds are said of scenes only, not of a {named[0]}")
        if self.use == "statements" and self.scenes is None:
            raise ValueError(f"only scenes have statements, not a {named[0]}")
        for use, column in (("captions", "text_column"), ("labels", "label_column")):
            if self.dataset is not None and self.use == use and getattr(self, column) is None:
                raise ValueError(f"use: {use} of a dataset needs {column}")
        return self


class TextSource(Strict):
    """One source of text: the rows of a text shard with one `source`, or the words of generated scenes."""

    shard: str | None = Field(None, description="name of the text shards, such as text-train")
    source: str | None = Field(None, description="the rows whose column `source` says so; all where unset")
    scenes: int | None = Field(None, ge=1, description="how many generated scenes lend their captions")
    weight: float = Field(gt=0, description="share of the documents, relative to the other sources")

    @model_validator(mode="after")
    def _one_source(self) -> "TextSource":
        if (self.shard is None) == (self.scenes is None):
            raise ValueError("name either a shard or a number of scenes")
        return self


class ConversationSource(Strict):
    """One source of conversations, in any form that `kangaroo data check` knows."""

    conversations: str = Field(
        description="a file, or the folder of a saved dataset; a relative path counts from the data folder"
    )
    hub: bool = Field(False, description="conversations is the name of a dataset on the Hugging Face hub instead")
    split: str = Field("train", description="split of a dataset")
    pictures: str | None = Field(None, description="folder that paths of pictures count from; the file's where unset")
    downloads: bool = Field(False, description="fetch pictures that are https addresses, and keep them")
    paths: bool = Field(True, description="open pictures that rows name; else rows hold their pictures as data URLs")
    weight: float = Field(1.0, ge=0, description="share of the samples, relative to the other sources")
    damaged: float = Field(0.01, ge=0, le=1, description="share of rows that may be bad and is skipped; 0 is strict")
