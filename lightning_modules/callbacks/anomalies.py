"""Clips with something wrong in time, made of clips with nothing wrong."""

from typing import Literal, get_args

import torch
from torch import Tensor

from penstock.kernels.philox import Draws

Anomaly = Literal["shuffled", "reversed", "frozen", "replaced"]
ANOMALIES = get_args(Anomaly)


def spoiled(clips: Tensor, index: Tensor, anomaly: Anomaly) -> tuple[Tensor, Tensor]:
    """Clips with an anomaly; what is drawn depends on their numbers only.

    - `shuffled`: the frames in random order.
    - `reversed`: from the last frame to the first.
    - `frozen`: the first frame all the time.
    - `replaced`: one random frame, not the first, is that of the clip before it in the batch (of the last one, for the
      first); a batch of one clip gives none.

    Args:
        clips: `(b, T, C, H, W)`, T at least 2.
        index: `(b,)` numbers of the clips.
        anomaly: which one.

    Returns:
        The clips, and whether each frame is one of another clip, bool `(b, T)`; b is 0 where none can be made.
    """
    frames = clips.shape[1]
    strange = torch.zeros(clips.shape[:2], dtype=torch.bool, device=clips.device)
    rows = torch.arange(len(clips), device=clips.device)
    if anomaly == "shuffled":
        order = Draws(0, 0, index).uniform("shuffled", (frames,)).argsort(1)
        return clips[rows[:, None], order], strange
    if anomaly == "reversed":
        return clips.flip(1), strange
    if anomaly == "frozen":
        return clips[:, :1].expand_as(clips), strange
    if len(clips) < 2:
        return clips[:0], strange[:0]
    at = 1 + (Draws(0, 0, index).uniform("replaced") * (frames - 1)).long().clamp(max=frames - 2)
    strange[rows, at] = True
    return torch.where(strange[:, :, None, None, None], clips.roll(1, 0), clips), strange
