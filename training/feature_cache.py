"""Keep what a frozen tower makes of each picture, by the picture's content, so that it is computed once."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

KEY_BYTES = 16


def content_key(view: Tensor) -> Tensor:
    """(2,) int64 of the pixels of `view`, uint8 (3, H, W): two views of one key are equal for all purposes."""
    content = view.contiguous().numpy()
    digest = hashlib.blake2b(content.tobytes(), digest_size=KEY_BYTES, person=str(content.shape).encode()[:16]).digest()
    return torch.frombuffer(bytearray(digest), dtype=torch.int64)


class FeatureCache:
    """Features on the CPU, as they came out of the tower; when the room is taken, later pictures are computed anew."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.held_bytes = 0
        self.computed = 0  # pictures that went through the tower
        self._features: dict[bytes, Tensor] = {}

    def features(self, views: Tensor, keys: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """(B, N, D) of `views` (B, 3, H, W): kept ones by `keys` (B, 2), the others by `compute` and kept then."""
        names = [key.numpy().tobytes() for key in keys.cpu()]
        places = {name: place for place, name in enumerate(names) if name not in self._features}
        fresh: dict[bytes, Tensor] = {}
        if places:
            # One picture that stands in the batch twice is computed once.
            made = compute(views[list(places.values())])
            self.computed += len(places)
            fresh = dict(zip(places, made, strict=True))
            for name, features in fresh.items():
                self._keep(name, features)
        together = [fresh[name] if name in fresh else self._features[name].to(views.device) for name in names]
        return torch.stack(together)

    def _keep(self, name: bytes, features: Tensor) -> None:
        size = features.numel() * features.element_size()
        if self.held_bytes + size <= self.most_bytes:
            self._features[name] = features.detach().to("cpu", copy=True)
            self.held_bytes += size
