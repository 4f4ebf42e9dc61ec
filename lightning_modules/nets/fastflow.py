"""FastFlow (arXiv 2111.07677): convolutional normalizing flows on the feature maps of a frozen network."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.kernels.coupling import Form, couple, decouple, passive
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.backbone import Backbone

UNIT_GAIN = 2 * math.log(math.exp(5) - 1)  # the gain 0.1 softplus(., beta=0.5) of it is 1
RatioBase = Literal["half", "full"]
Norm = Literal["sample", "channel"]
Coded = list[tuple[Tensor, Tensor]]


class CouplingStep(nn.Module):
    """One step: an affine coupling whose subnet sees the first half of the channels, a gain, and a permutation.

    The subnet is `Conv - ReLU - Conv`; `kernels.coupling` has the rest.

    Args:
        channels: C; the first `C - C // 2` pass unchanged.
        hidden: Channels between the two convolutions.
        kernel: Side of both.
        clamp: Bound of the log-scale.
        form: Of that bound, see `kernels.coupling`.
    """

    def __init__(self, channels: int, hidden: int, kernel: int, clamp: float = 2.0, form: Form = "tanh"):
        super().__init__()
        active = channels // 2
        self.clamp, self.form = clamp, form
        self.subnet = nn.Sequential(
            nn.Conv2d(channels - active, hidden, kernel, padding=kernel // 2),
            nn.ReLU(),
            nn.Conv2d(hidden, 2 * active, kernel, padding=kernel // 2),
        )
        self.global_scale = nn.Parameter(torch.full((channels,), UNIT_GAIN))
        self.global_offset = nn.Parameter(torch.zeros(channels))
        self.register_buffer("perm", torch.randperm(channels))

    @property
    def gain(self) -> Tensor:
        """g > 0, `(C,)`."""
        return 0.1 * F.softplus(self.global_scale, beta=0.5)

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, C, H, W)` and the log-determinant `(B,)`."""
        a = self.subnet(u[:, : len(self.perm) - len(self.perm) // 2])
        return couple(u, a, self.gain, self.global_offset, self.perm, self.clamp, self.form)

    def inverse(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` maps to `v`, and the log-determinant of this way."""
        a = self.subnet(passive(v, self.gain, self.global_offset, self.perm))
        return decouple(v, a, self.gain, self.global_offset, self.perm, self.clamp, self.form)


class CouplingFlow(nn.Module):
    """Steps one after the other, on maps of any size.

    Args:
        channels: C.
        steps: How many.
        conv3x3_only: Kernels of 3; otherwise 3 and 1 by turns.
        hidden_ratio: Channels between a subnet's convolutions, as a part of those of `hidden_ratio_base`.
        hidden_ratio_base: `half`, the channels that a subnet sees (public code), or `full`, all C. With 20 steps on the
            768 channels of vision transformers `full` and a ratio of 1/6 have 14,794,240 parameters, the paper's
            14.8 M; the ratio of 0.16 has 14,102,920, and 7,074,500 with `half`.
        clamp: See `CouplingStep`.
        form: See `kernels.coupling`.
    """

    def __init__(
        self,
        channels: int,
        steps: int = 8,
        conv3x3_only: bool = False,
        hidden_ratio: float = 1.0,
        hidden_ratio_base: RatioBase = "half",
        clamp: float = 2.0,
        form: Form = "tanh",
    ):
        super().__init__()
        base = channels - channels // 2 if hidden_ratio_base == "half" else channels
        hidden = int(base * hidden_ratio)
        if channels < 2 or hidden < 1 or steps < 1:
            raise ValueError(
                f"flow of {channels} channels, {steps} steps, hidden_ratio={hidden_ratio}: expected 2, 1, and a hidden "
                "channel at least"
            )
        kernels = [1 if k % 2 and not conv3x3_only else 3 for k in range(steps)]
        self.steps = nn.ModuleList(CouplingStep(channels, hidden, kernel, clamp, form) for kernel in kernels)

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Noise `(B, C, H, W)` and the log-determinant `(B,)` of a map."""
        logdet = 0
        for step in self.steps:
            y, one = step(y)
            logdet = logdet + one
        return y, logdet

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """A map of noise, and the log-determinant of this way."""
        logdet = 0
        for step in reversed(self.steps):
            z, one = step.inverse(z)
            logdet = logdet + one
        return z, logdet


class SampleNorm(nn.Module):
    """Layer norm of each sample over all of `(C, H, W)`.

    Args:
        shape: (C, H, W) of an affine map of its elements, which ties the norm to that size; None is none.
    """

    def __init__(self, shape: tuple[int, int, int] | None = None):
        super().__init__()
        self.weight = None if shape is None else nn.Parameter(torch.ones(shape))
        self.bias = None if shape is None else nn.Parameter(torch.zeros(shape))

    def forward(self, y: Tensor) -> Tensor:
        if self.weight is not None and y.shape[1:] != self.weight.shape:
            raise UserError(
                f"images: their feature maps are {tuple(y.shape[1:])}, expected {tuple(self.weight.shape)}; a flow of "
                "any size needs model.net.norm_affine=false"
            )
        return F.layer_norm(y, y.shape[1:], self.weight, self.bias)


class ChannelNorm(nn.Module):
    """Takes the mean of each channel off and divides by its standard deviation, both of the training images.

    Nothing of it trains, and how bright or strong the maps of a sample are is kept, which `SampleNorm` takes away.

    Args:
        channels: C.

    Attributes:
        count: How many elements of a channel the moments are of; 0 until `fit`.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def fit(self, moments: Tensor) -> None:
        """Takes the sums over training maps of 1, y and y^2, float64 `(3, C)`."""
        count, total, square = moments
        mean = total / count
        self.mean.copy_(mean)
        self.std.copy_((square / count - mean.square()).clamp(min=1e-12).sqrt())
        self.count.copy_(count[0].long())

    def forward(self, y: Tensor) -> Tensor:
        return (y - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)


def moments_of(y: Tensor) -> Tensor:
    """Sums of 1, y and y^2 of maps `(B, C, H, W)` by channel, float64 `(3, C)`."""
    rows = y.double().transpose(0, 1).flatten(1)
    return torch.stack([torch.full_like(rows[:, 0], rows.shape[1]), rows.sum(1), rows.square().sum(1)])


class FastFlowNet(nn.Module):
    """A frozen network, and a flow for each of its maps.

    The affine part of the samples' norm is outside of the flow: its Jacobian is not in the loss, which shrinking it
    lowers without bound. Public code has it; without it, or with the norm of channels, there is a best loss.

    Args:
        backbone: Images to maps.
        image_size: Side or (height, width) of training images, to which `norm_affine` ties the flows.
        flow_steps: See `CouplingFlow`.
        conv3x3_only: See there.
        hidden_ratio: See there.
        hidden_ratio_base: See there.
        clamp: See there.
        form: See there.
        norm: Of each map: `sample` as in public code, see `SampleNorm`, or `channel`, see `ChannelNorm`; None is none,
            for transformers that have their own.
        norm_affine: Whether the norm of samples has a trainable gain and offset of every element.
    """

    forward_methods = ("maps", "encode")

    def __init__(
        self,
        backbone: Backbone,
        image_size: int | Sequence[int] = 256,
        flow_steps: int = 8,
        conv3x3_only: bool = False,
        hidden_ratio: float = 1.0,
        hidden_ratio_base: RatioBase = "half",
        clamp: float = 2.0,
        form: Form = "tanh",
        norm: Norm | None = "sample",
        norm_affine: bool = True,
    ):
        super().__init__()
        self.backbone = backbone
        self.image_size = size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if norm == "channel":
            norms = [ChannelNorm(c) for c in backbone.channels]
        elif norm == "sample" and norm_affine:
            norms = [SampleNorm((c, *hw)) for c, hw in zip(backbone.channels, backbone.sizes(size))]
        else:
            norms = [SampleNorm() if norm else nn.Identity() for _ in backbone.channels]
        self.norms = nn.ModuleList(norms)
        self.flows = nn.ModuleList(
            CouplingFlow(c, flow_steps, conv3x3_only, hidden_ratio, hidden_ratio_base, clamp, form)
            for c in backbone.channels
        )

    def maps(self, image: Tensor) -> list[Tensor]:
        """Feature maps `(B, C_l, H_l, W_l)` of images `(B, 3, H, W)` in [-1, 1]."""
        return self.backbone(image)

    def encode(self, maps: Sequence[Tensor]) -> Coded:
        """(noise `(B, C_l, H_l, W_l)`, log-determinant `(B,)`) of every feature map."""
        return [flow(norm(y)) for flow, norm, y in zip(self.flows, self.norms, maps)]

    def forward(self, image: Tensor) -> Coded:
        """The same of images `(B, 3, H, W)` in [-1, 1]."""
        return self.encode(self.backbone(image))


def negative_log_likelihood(coded: Coded) -> Tensor:
    """`sum_l 1/2 |z_l|^2 - logdet_l` of each sample `(B,)` in nats, without the constant (section 3.3 of the paper)."""
    return sum(0.5 * z.to(logdet.dtype).square().flatten(1).sum(1) - logdet for z, logdet in coded)
