"""How a setting changes over the steps of a run."""

import math


def cosine(start: float, end: float, step: int, steps: int) -> float:
    """`start` at step 0, `end` at step `steps` and after it, half a cosine between them.

    The last step of a run is `steps` - 1, just short of `end`, as in the code of DINO (Caron et al. 2021) and MoCo v3
    (Chen et al. 2021).
    """
    passed = min(step, steps) / max(steps, 1)
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * passed))


def warm_up(start: float, end: float, step: int, warm_up_steps: int) -> float:
    """`start` at step 0, `end` from step `warm_up_steps` on, a straight line between them."""
    if step >= warm_up_steps:
        return end
    return start + (end - start) * step / warm_up_steps
