"""Pictures as tensors: the pixels of an opened one, and what an image processor makes of them for its tower."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor


def pixels_of(picture: Image.Image) -> Tensor:
    """uint8 (3, H, W) pixels of an RGB picture."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def processed(image_processor: BaseImageProcessor, pictures: Tensor | Sequence[Tensor]) -> Tensor:
    """float32 (B, 3, H, W) as the tower was trained to see, from uint8 (3, H, W) pictures of any sizes."""
    return image_processor(list(pictures), return_tensors="pt", input_data_format="channels_first")["pixel_values"]
