"""The launch files of training/launch are what accelerate reads: as many processes on each machine as they say."""

import shlex

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from tests.test_deploy import DOCUMENT, said_commands
from tests.test_house import ROOT

LAUNCH = ROOT / "training" / "launch"
SHIPPED = {"1x8.yaml": (1, 8), "4x8.yaml": (4, 32)}


def test_every_launch_file_is_looked_at() -> None:
    assert {file.name for file in LAUNCH.iterdir()} == SHIPPED.keys()


@pytest.mark.parametrize("name", SHIPPED)
def test_accelerate_reads_the_file(name: str) -> None:
    read = load_config_from_file(str(LAUNCH / name))
    assert (read.num_machines, read.num_processes) == SHIPPED[name]
    assert read.distributed_type == "MULTI_GPU" and read.mixed_precision == "no" and not read.use_cpu


@pytest.mark.parametrize("name", SHIPPED)
def test_accelerate_starts_eight_processes_on_each_machine(name: str) -> None:
    """By accelerate's own way from the file to torchrun's words, as its comment says the command."""
    text = (LAUNCH / name).read_text().replace("\\\n#", "")
    [said] = [shlex.split(line.lstrip("# ")) for line in text.splitlines() if "accelerate launch" in line]
    words = [str(ROOT / word) if word.startswith("training/") else word for word in said[2:]]
    words = ["0" if word == "$RANK" else word for word in words]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert args.multi_gpu and not args.cpu
    prepare_multi_gpu_env(args)
    machines, processes = SHIPPED[name]
    assert int(args.nproc_per_node) == processes // machines == 8
    assert (args.module, args.training_script, args.training_script_args[0]) == (True, "ui.command_line", "train")
    if machines > 1:
        assert (int(args.nnodes), args.node_rank, args.rdzv_endpoint) == (machines, 0, "$FIRST:29500")


def test_the_document_names_launch_files_that_are_there() -> None:
    named = {word for words in said_commands(DOCUMENT) for word in words if word.startswith("training/launch/")}
    assert named == {f"training/launch/{name}" for name in SHIPPED}
