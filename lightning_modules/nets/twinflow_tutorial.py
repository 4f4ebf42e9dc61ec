"""The two small networks of TwinFlow's tutorials under their official keys, in the project's time (t = 1 data)."""

import torch
from torch import Tensor, nn


def _relu_conv(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.ReLU(), nn.Conv2d(inputs, outputs, 3, padding=1)]


def _times(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(1, dim), nn.ReLU(), nn.Linear(dim, dim))


class TwinFlowUNet(nn.Module):
    """The convolutional network of the MNIST tutorial (arXiv 2512.05150, official code): velocity `net(x) - x`.

    Two levels without normalisation; embeddings of both times and of the class are a bias in the middle.

    Args:
        shape: (1, H, W), square, H a multiple of 4.
        width: channels of the first level.
        time_dim: size of each time's embedding.
        label_dim: size of a class's embedding.
        num_classes: at least 1; the null class of this network is a zero embedding.

    Raises:
        ValueError: another shape.
    """

    def __init__(
        self,
        shape: tuple[int, int, int] = (1, 28, 28),
        width: int = 64,
        time_dim: int = 64,
        label_dim: int = 64,
        num_classes: int = 10,
    ):
        super().__init__()
        if len(shape) != 3 or shape[0] != 1 or shape[1] != shape[2] or shape[1] % 4:
            raise ValueError(f"shape must be (1, H, H), H a multiple of 4, got {tuple(shape)}")
        self.shape, self.num_classes = tuple(shape), num_classes
        self.time_embedding, self.target_time_embedding = _times(time_dim), _times(time_dim)
        self.label_embedding = nn.Embedding(num_classes, label_dim)
        self.enc1 = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 4, stride=2, padding=1)
        )
        self.enc2 = nn.Sequential(
            *_relu_conv(width, 2 * width), nn.ReLU(), nn.Conv2d(2 * width, 2 * width, 4, stride=2, padding=1)
        )
        self.bottleneck = nn.Sequential(*_relu_conv(2 * width, 4 * width))
        self.cond_projection = nn.Linear(2 * time_dim + label_dim, 4 * width)
        self.dec1 = nn.Sequential(
            nn.ConvTranspose2d(6 * width, 2 * width, 4, stride=2, padding=1), *_relu_conv(2 * width, 2 * width)
        )
        self.dec2 = nn.Sequential(
            nn.ReLU(), nn.ConvTranspose2d(3 * width, width, 4, stride=2, padding=1), *_relu_conv(width, width)
        )
        self.output_conv = nn.Conv2d(width, 1, 3, padding=1)

    def drop_condition(self, cond: Tensor, mask: Tensor) -> Tensor:
        """`cond` `(B,)` with the number -1, a zero embedding, where `mask` `(B,)` is true."""
        return torch.where(mask, -1, cond)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        """Average velocity `(B, 1, H, W)` from `t` to `r` `(B,)`, t in [0, 2]; None is r = t."""
        e1, e2 = self.time_embedding(1 - t[:, None]), self.target_time_embedding(1 - (t if r is None else r)[:, None])
        if cond is None:
            label = e1.new_zeros(len(x), self.label_embedding.embedding_dim)
        else:
            label = self.label_embedding(cond.clamp(min=0)) * (cond >= 0)[:, None]
        skip1 = self.enc1(x)
        skip2 = self.enc2(skip1)
        h = self.bottleneck(skip2) + self.cond_projection(torch.cat([e1, e2, label], 1))[:, :, None, None]
        h = self.dec2(torch.cat([self.dec1(torch.cat([h, skip2], 1)), skip1], 1))
        return self.output_conv(h) - x


class TwinFlowMLP(nn.Module):
    """The network of the 2-D tutorial: three linear layers on `[x, 1 - t, 1 - r]` (official code).

    Args:
        shape: (D,) of a point.
        width: of the hidden layers.
    """

    num_classes = 0

    def __init__(self, shape: tuple[int] = (2,), width: int = 256):
        super().__init__()
        self.shape = tuple(shape)
        inputs = shape[0] + 2
        layers = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, shape[0])]
        self.network = nn.Sequential(*layers)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        """Average velocity `(B, D)` of `x` `(B, D)` from `t` to `r` `(B,)`, t in [0, 2]; None is r = t."""
        until = t if r is None else r
        return -self.network(torch.cat([x, 1 - t[:, None], 1 - until[:, None]], 1))
