"""The options of `kangaroo evaluate`, those of an assistant apart from those of a tower."""

from pathlib import Path
from typing import Annotated, Literal

import typer

ASSISTANTS, TOWERS, BOTH = "An assistant", "A vision tower", "Both"
DEFAULT_TASK = "scenes"  # needs no data
TOWER_BATCH, ASSISTANT_BATCH = 64, 16

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="A folder or hub name (organisation/name) of an assistant or a tower, told apart by its "
        "configuration; with --endpoint a model's name there.",
        show_default="Joey, or Joey's embedder",
    ),
]
TaskOption = Annotated[
    list[str] | None,
    typer.Option(
        help="A shipped task (scenes, flickr8k-captions, coco-yes-no, visual7w-choices, daquar-words, "
        "nlvr-true-false, text-perplexity) or a .yaml file; again for more.",
        show_default=DEFAULT_TASK,
        rich_help_panel=ASSISTANTS,
    ),
]
AgainstOption = Annotated[
    str | None,
    typer.Option(
        metavar="OTHER",
        help="Compare with another model on the same questions: its folder, or the .json of an earlier report.",
        rich_help_panel=ASSISTANTS,
    ),
]
EndpointOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Ask an OpenAI-compatible server. Example: http://localhost:8000/v1",
        rich_help_panel=ASSISTANTS,
    ),
]
ApiKeyEnvOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The environment variable with the server's key.", rich_help_panel=ASSISTANTS),
]
AtOnceOption = Annotated[
    int, typer.Option(min=1, max=256, help="Questions on the way to the server.", rich_help_panel=ASSISTANTS)
]
TimeoutOption = Annotated[
    float, typer.Option(min=0.1, help="Seconds that the server has for an answer.", rich_help_panel=ASSISTANTS)
]
RetriesOption = Annotated[
    int,
    typer.Option(
        min=0, max=20, help="Tries after a failure that may pass, later and later.", rich_help_panel=ASSISTANTS
    ),
]
PredictionsOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Score the answers in this file, and ask nobody.", rich_help_panel=ASSISTANTS),
]
PartialOption = Annotated[
    bool,
    typer.Option("--partial", help="Score what is answered, where not all is.", rich_help_panel=ASSISTANTS),
]
LimitOption = Annotated[
    int | None,
    typer.Option(min=1, help="At most so many pictures (or texts) of a task.", rich_help_panel=ASSISTANTS),
]
TrainOption = Annotated[
    str | None,
    typer.Option(
        metavar="DATA",
        help="Labelled pictures to learn from: a folder of labels' folders, or a shard.",
        rich_help_panel=TOWERS,
    ),
]
TestOption = Annotated[
    str | None, typer.Option(metavar="DATA", help="Labelled pictures to name.", rich_help_panel=TOWERS)
]
PairsOption = Annotated[
    str | None,
    typer.Option(
        metavar="DATA", help="Pictures with captions: a .jsonl or .csv file, or a shard.", rich_help_panel=TOWERS
    ),
]
FeaturesOption = Annotated[
    Literal["pooled", "patches", "both"],
    typer.Option(help="What probes read; patches is the mean over them.", rich_help_panel=TOWERS),
]
NeighboursOption = Annotated[int, typer.Option(min=1, help="How many neighbours vote in kNN.", rich_help_panel=TOWERS)]
ShotsOption = Annotated[
    str | None,
    typer.Option(
        help="Probe with so few pictures of each label too, drawn five times. Example: 1,5,10",
        rich_help_panel=TOWERS,
    ),
]
TemplatesOption = Annotated[
    Path | None,
    typer.Option(
        help="Wordings for zero-shot beside the usual ones: a file, one a line, {} where the label goes.",
        rich_help_panel=TOWERS,
    ),
]
FeaturesFolderOption = Annotated[
    Path | None,
    typer.Option(
        envvar="KANGAROO_FEATURES",
        help="Where features are kept, so that the same pictures never go through the same tower twice.",
        show_default="~/.cache/kangaroo/features",
        rich_help_panel=TOWERS,
    ),
]
KeepOption = Annotated[
    bool,
    typer.Option("--keep/--no-keep", help="Keep features, and use those that were kept.", rich_help_panel=TOWERS),
]
DataOption = Annotated[
    Path | None,
    typer.Option(envvar="KANGAROO_DATA", help="The folder of the Parquet shards that are named.", rich_help_panel=BOTH),
]
BatchOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Pictures, or questions, at once.",
        show_default=f"{TOWER_BATCH}, or {ASSISTANT_BATCH} questions",
        rich_help_panel=BOTH,
    ),
]
Bf16Option = Annotated[bool, typer.Option("--bf16", help="Run the model in bfloat16.", rich_help_panel=BOTH)]
OutOption = Annotated[
    Path | None,
    typer.Option(
        help="Write the report into this file, as JSON; an assistant's answers are kept beside it.",
        show_default="evaluations/MODEL.json for an assistant",
        rich_help_panel=BOTH,
    ),
]
PageOption = Annotated[
    Path | None,
    typer.Option(help="Write a page for the browser into this file: pictures, answers, errors.", rich_help_panel=BOTH),
]
