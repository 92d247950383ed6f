"""Write weights as safetensors that everyone may read who may read the files beside them."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel


def write_weights(weights: Mapping[str, Tensor], file: Path) -> None:
    """`weights` in `file`, which may be the one that they were read from."""
    save_file({name: value.contiguous() for name, value in weights.items()}, file, metadata={"format": "pt"})
    _share([file])


def write_model(model: PreTrainedModel, folder: Path, **options: Any) -> None:
    """What transformers' `save_pretrained` writes with these options."""
    model.save_pretrained(folder, **options)
    _share(folder.glob("*.safetensors"))


def _share(files: Iterable[Path]) -> None:
    """Give `files` the mode of any new file: safetensors 0.8 lets nobody but their owner read them.

    A model could not be served by another user than the one who taught it (safetensors issue 782).
    """
    mask = os.umask(0o077)  # it can only be read by setting it
    os.umask(mask)
    for file in files:
        file.chmod(0o666 & ~mask)
