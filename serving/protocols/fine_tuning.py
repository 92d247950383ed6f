"""What `/v1/fine_tuning/jobs` takes and gives, as OpenAI's clients know it."""

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, model_validator

from serving.protocols.common import Part, Text

MOST_METADATA = 16  # pairs, as OpenAI's

Status = Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]
ENDED: frozenset[Status] = frozenset(("succeeded", "failed", "cancelled"))
ALIVE: frozenset[Status] = frozenset(get_args(Status)) - ENDED


MetadataKey = Annotated[Text, Field(max_length=64)]
MetadataValue = Annotated[Text, Field(max_length=512)]
Metadata = Annotated[dict[MetadataKey, MetadataValue], Field(max_length=MOST_METADATA)]
FileId = Annotated[Text, Field(min_length=1, max_length=64, description="The id that `/v1/files` gave.")]


class HyperparametersWanted(Part):
    """How it is taught; `auto` chooses by the file and the model."""

    batch_size: Annotated[
        Literal["auto"] | Annotated[int, Field(ge=1, le=256)], Field(description="Rows of a step.")
    ] = "auto"
    learning_rate_multiplier: Annotated[
        Literal["auto"] | Annotated[float, Field(ge=0.01, le=100)],
        Field(description="Times the usual learning rate of the model."),
    ] = "auto"
    n_epochs: Annotated[
        Literal["auto"] | Annotated[int, Field(ge=1, le=100)], Field(description="How often each row is seen.")
    ] = "auto"


class SupervisedWanted(Part):
    """Answers are learned as they stand in the file."""

    hyperparameters: HyperparametersWanted | None = None


class MethodWanted(Part):
    """How a model is taught; over the API that is by answers alone (`kangaroo prefer` knows preferences)."""

    type: Literal["supervised"]
    supervised: SupervisedWanted | None = None


class JobRequest(Part):
    """The body of `POST /v1/fine_tuning/jobs`."""

    model: Annotated[Text, Field(description="The model of this server that is taught.")]
    training_file: FileId
    validation_file: FileId | None = None
    suffix: Annotated[
        str | None,
        Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$", description="Of the new model's name."),
    ] = None
    seed: Annotated[int | None, Field(ge=0, le=2**31 - 1)] = None
    metadata: Metadata | None = None
    method: MethodWanted | None = None
    hyperparameters: Annotated[
        HyperparametersWanted | None, Field(description="The older place of what `method` says.")
    ] = None
    integrations: Annotated[list[dict[str, Any]] | None, Field(max_length=0, description="There are none here.")] = None

    @model_validator(mode="after")
    def check(self) -> "JobRequest":
        if self.hyperparameters is not None and self.method is not None:
            raise ValueError("hyperparameters stand in method.supervised where there is a method, not beside it")
        return self

    def wanted(self) -> HyperparametersWanted:
        """What is asked for, wherever it stands."""
        inner = self.method.supervised.hyperparameters if self.method and self.method.supervised else None
        return inner or self.hyperparameters or HyperparametersWanted()


class Hyperparameters(BaseModel):
    """How a job is taught, with nothing left to choose."""

    batch_size: int
    learning_rate_multiplier: float
    n_epochs: int


class Supervised(BaseModel):
    """The part of a method that is in use."""

    hyperparameters: Hyperparameters


class Method(BaseModel):
    """How a job is taught."""

    type: Literal["supervised"] = "supervised"
    supervised: Supervised


class JobError(BaseModel):
    """Why a job failed; `param` names the field at fault where one is."""

    code: str
    message: str
    param: str | None = None


class FineTuningJob(BaseModel):
    """A job as OpenAI describes one; times are seconds since 1970."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None = None
    estimated_finish: int | None = None
    status: Status
    error: JobError | None = None
    model: str
    fine_tuned_model: str | None = None
    organization_id: str = "kangaroo"
    training_file: str
    validation_file: str | None = None
    result_files: list[str] = []
    hyperparameters: Hyperparameters
    method: Method
    seed: int
    trained_tokens: int | None = None
    integrations: list[dict[str, Any]] = []
    metadata: dict[str, str] | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.status in ENDED


class JobList(BaseModel):
    """One page of the answer to `GET /v1/fine_tuning/jobs`, the newest first."""

    object: Literal["list"] = "list"
    data: list[FineTuningJob]
    has_more: bool = False


class JobEvent(BaseModel):
    """Something that happened to a job; `data` holds the numbers of a step where `type` is metrics."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"] = "message"
    data: dict[str, float] | None = None


class JobEventList(BaseModel):
    """One page of the answer to `GET /v1/fine_tuning/jobs/{id}/events`, the newest first."""

    object: Literal["list"] = "list"
    data: list[JobEvent]
    has_more: bool = False


class CheckpointMetrics(BaseModel):
    """What was measured nearest before a checkpoint; losses are means over the learned tokens, in nats."""

    step: int
    train_loss: float | None = None
    full_valid_loss: float | None = None


class JobCheckpoint(BaseModel):
    """A model that came out of a job and can be asked."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: CheckpointMetrics


class JobCheckpointList(BaseModel):
    """The answer to `GET /v1/fine_tuning/jobs/{id}/checkpoints`: the finished model, once there is one."""

    object: Literal["list"] = "list"
    data: list[JobCheckpoint]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False
