"""A trained flow as few operators as possible, for inference and export: the same `mean_c z^2`, no log-determinant."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.kernels._coupling_cpu import SOFT, slope_of
from penstock.lightning_modules.nets.fastflow import CouplingFlow, CouplingStep

BLOCK = 16  # channels that convolutions of CPU runtimes take at once


class FoldedStep(nn.Module):
    """A `CouplingStep` of the channels `u = scale * x`, on the two halves of `x`.

    Gains stay in the scale, what multiplies the subnet's output goes into its weights, and hidden channels are filled
    up with zeros to whole blocks. The log-scale and the shift come out of convolutions of their own, so that none is
    cut in two.

    Args:
        step: Trained.
        scale: Of its input, float64 `(C,)`.

    Attributes:
        scale: Of its output before the permutation, float64 `(C,)`.
    """

    def __init__(self, step: CouplingStep, scale: Tensor):
        super().__init__()
        first, second = step.subnet[0], step.subnet[2]
        active = len(step.perm) // 2
        passive = len(step.perm) - active
        gain, offset = step.gain.double(), step.global_offset.double()
        self.clamp, self.scale = step.clamp, scale * gain
        shift = offset / self.scale
        hidden = -first.out_channels % BLOCK
        weight = F.pad(first.weight.double() * scale[:passive, None, None], (0, 0) * 3 + (0, hidden))
        self.hidden = convolution(weight, F.pad(first.bias.double(), (0, hidden)))
        weight, bias = F.pad(second.weight.double(), (0, 0) * 2 + (0, hidden)), second.bias.double()
        slope = slope_of(step.clamp, step.form)
        self.log_scale = convolution(slope * weight[:active], slope * bias[:active])
        by = SOFT / scale[passive:]
        self.moved = convolution(by[:, None, None, None] * weight[active:], by * bias[active:] + shift[passive:])
        self.register_buffer("shift", shift[:passive].float().view(-1, 1, 1))

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Halves `(B, C - C // 2, H, W)` and `(B, C // 2, H, W)` to `(B, C, H, W)`, not permuted yet."""
        h = self.hidden(x1).relu()
        x2 = x2 * (self.clamp * self.log_scale(h).tanh()).exp() + self.moved(h)
        return torch.cat([x1 + self.shift, x2], 1)


class FoldedFlow(nn.Module):
    """`mean_c z^2` `(B, 1, H, W)` of the noise that a trained flow makes of a map `(B, C, H, W)`, in float32.

    Permutations pick the halves of the next step; the last one is left out, for it does not change the mean.
    """

    def __init__(self, flow: CouplingFlow):
        super().__init__()
        channels = len(flow.steps[0].perm)
        order, scale = torch.arange(channels), torch.ones(channels, dtype=torch.float64)
        steps: list[FoldedStep] = []
        with torch.no_grad():
            for k, step in enumerate(flow.steps):
                one, two = order.tensor_split([channels - channels // 2])
                self.register_buffer(f"first_{k}", one)
                self.register_buffer(f"second_{k}", two)
                steps.append(FoldedStep(step, scale[order] if k else scale))
                scale, order = steps[-1].scale, step.perm
            weight = (scale.square() / channels).float().view(1, channels, 1, 1)
        self.steps = nn.ModuleList(steps)
        self.register_buffer("weight", weight)

    def forward(self, y: Tensor) -> Tensor:
        for k, step in enumerate(self.steps):
            halves = (y.index_select(1, self.get_buffer(f"{half}_{k}")) for half in ("first", "second"))
            y = step(*halves)
        return F.conv2d(y.square(), self.weight)


def convolution(weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """Of these weights `(out, in, k, k)`, k odd, at the same size, frozen."""
    made = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], padding=weight.shape[2] // 2)
    made.weight.copy_(weight)
    made.bias.copy_(bias)
    return made.requires_grad_(False)
