"""Commands that make a model ready to serve: merge an adapter into its base, and export in another form."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ui.commands.shared import ModelArgument, fail, plain_errors, stopping, tell

PANEL = "Teach"
commands = typer.Typer()
SECONDS_TO_START = 900.0  # of a large model on a slow disk
NOTHING_LEFT = "stopped; nothing was written."

OutOption = Annotated[Path, typer.Option(help="The folder of the new model; it must not be there yet.")]
DataOption = Annotated[
    str | None,
    typer.Option(help="Compare on rows of this file of conversations.", show_default="generated scenes"),
]
PicturesOption = Annotated[
    Path | None, typer.Option(help="The folder that paths of pictures count from.", show_default="the file's own")
]
PromptsOption = Annotated[int, typer.Option(min=1, help="On how many questions about pictures it is compared.")]


@commands.command(
    rich_help_panel=PANEL, epilog="Example: kangaroo merge runs/tune/model/adapter --out merged    (then: serve merged)"
)
def merge(
    adapter: Annotated[Path, typer.Argument(help="A folder with a LoRA adapter, ours or peft's.", show_default=False)],
    out: OutOption,
    base: Annotated[
        str | None,
        typer.Option(help="The model that the adapter stands on.", show_default="the one that it names"),
    ] = None,
    data: DataOption = None,
    pictures: PicturesOption = None,
    prompts: PromptsOption = 4,
) -> None:
    """Merge an adapter into its full-precision base, and refuse where the result answers otherwise than both together.

    Log-probabilities of every token of a few prompts with pictures are compared: base and adapter side by side, against
    the merged model as it was written. On a mismatch nothing is left but the message.
    """
    from rich.console import Console

    from assistant.merging import merge as merge_models
    from assistant.merging import merge_table
    from assistant.models import ModelError, find_model
    from training.check_questions import check_requests
    from training.data.pictures import DataError

    with plain_errors(ModelError, DataError), stopping(NOTHING_LEFT):
        asked = check_requests(data, prompts, pictures)
        report = merge_models(adapter, out, asked, None if base is None else find_model(base))
    for remark in (report.unproven, report.only_merged and f"merged it is served; alone not: {report.only_merged}"):
        if remark:
            tell(remark)
    Console().print(merge_table(report))
    print(f"The model is in {out}. Serve it: kangaroo serve {out}")


@commands.command(
    rich_help_panel=PANEL, epilog="Example: kangaroo export merged --out small --format int8 --check    (needs vLLM)"
)
def export(
    out: OutOption,
    model: ModelArgument = None,
    form: Annotated[
        Literal["bfloat16", "float32", "int8", "bitsandbytes-4bit", "bitsandbytes-8bit"],
        typer.Option(
            "--format",
            help="bfloat16 and float32 change no more than the rounding. int8 stores the language model's matrices in "
            "8 bits, for CPUs and GPUs; bitsandbytes' forms are for GPUs, where vLLM has vllm-bnb-plugin beside it.",
        ),
    ] = "bfloat16",
    check: Annotated[
        bool, typer.Option("--check", help="Serve the result with vLLM and compare it with the original.")
    ] = False,
    data: DataOption = None,
    pictures: PicturesOption = None,
    prompts: PromptsOption = 8,
    tokens: Annotated[int, typer.Option(min=1, help="Longest answer that is compared.")] = 24,
) -> None:
    """Write a model in another form, and with --check prove that vLLM answers with it as the original does.

    vLLM answers greedily; transformers reads the same prompts and the same answers with the original model, in the same
    arithmetic. Exit code 1, and nothing is left, when log-probabilities lie further apart than the form allows.
    """
    from rich.console import Console

    from assistant.exporting import MEAN_TOLERANCE, arithmetic_of, export_model, largest_allowed
    from assistant.models import ModelError, find_model
    from assistant.whole_folders import written_aside
    from serving.engine import EngineError
    from serving.parity import ParityError, compare_served, fault_in, parity_table
    from training.check_questions import check_requests
    from training.data.pictures import DataError

    with plain_errors(ModelError, DataError, EngineError, ParityError), stopping(NOTHING_LEFT):
        source = find_model(model)
        asked = check_requests(data, prompts, pictures) if check else []
        with written_aside(out) as aside:
            export_model(source, model or "Joey", form, aside)
            if check:
                tell("starting vLLM on what was exported ...")
                allowed = largest_allowed(form), MEAN_TOLERANCE.get(form)
                compared = compare_served(aside, source, arithmetic_of(form), asked, tokens, SECONDS_TO_START)
                Console().print(parity_table(compared, *allowed))
                fault = fault_in(compared, *allowed)
                if fault is not None:
                    raise fail(f"vLLM does not answer as the original does: {fault}. Nothing was kept at {out}")
    print(f"The model is in {out}. Serve it: kangaroo serve {out}")
