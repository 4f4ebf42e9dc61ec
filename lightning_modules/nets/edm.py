"""EDM's denoiser as a velocity field (arXiv 2206.00364 table 1; arXiv 2405.20320 section 3 and proposition 1).

The paper's time runs the other way, `t_paper = 1 - t`: here t = 0 is noise, t = 1 data, `x_t = t x1 + (1 - t) x0`.
"""

from torch import Tensor, nn

from penstock.lightning_modules.nets.condition import check_input, working_dtype
from penstock.lightning_modules.nets.edm_blocks import UNetBlock
from penstock.lightning_modules.nets.edm_unets import DhariwalUNet, SongUNet


class EDMVelocity(nn.Module):
    """The velocity `E[x1 - x0 | x_t]` of an EDM network `F(x, ln(sigma) / 4, cond)`.

    With `s = 1 - t`, `sigma = s / t`, `y = x_t / t`, the denoiser is
    `D(y; sigma) = c_skip y + c_out F(c_in y, ln(sigma) / 4)` and the velocity `(D - x_t) / s`. Written out,

        v = (sd^2 t - s) / q x_t + sd / sqrt(q) F(x_t / sqrt(q), ln(s / t) / 4),   q = s^2 + sd^2 t^2,

    which divides by neither t nor s. An EDM checkpoint is a first rectified flow as it is. Times are clamped into
    [margin, 1 - margin], where the logarithm is finite.

    Args:
        model: the network F, with `shape`, `num_classes` and `drop_condition`.
        sigma_data: `sd`, standard deviation of the data for which F was scaled.
        margin: distance from t = 0 and t = 1.
    """

    checkpoint_blocks = (UNetBlock,)

    def __init__(self, model: nn.Module, sigma_data: float = 0.5, margin: float = 1e-5):
        super().__init__()
        if sigma_data <= 0:
            raise ValueError(f"sigma_data must be positive, got {sigma_data}")
        if not 0 < margin < 0.5:
            raise ValueError(f"margin must be in (0, 0.5), got {margin}")
        self.model, self.sigma_data, self.margin = model, sigma_data, margin
        self.shape, self.num_classes = tuple(model.shape), model.num_classes

    def drop_condition(self, cond: Tensor, mask: Tensor) -> Tensor:
        """`cond` `(B,)` with the null class where `mask` `(B,)` is true."""
        return self.model.drop_condition(cond, mask)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Velocity `(B, C, H, W)` at x `(B, C, H, W)`, t `(B,)` in [0, 1] (0 = noise), cond `(B,)` classes or None."""
        check_input(x, t, self.shape)
        t = t.to(working_dtype(t)).clamp(self.margin, 1 - self.margin)
        s, sd = 1 - t, self.sigma_data
        q = s.square() + (sd * t).square()
        slope, root = ((sd**2 * t - s) / q)[:, None, None, None], q.sqrt()[:, None, None, None]
        f = self.model((x / root).to(x.dtype), (s / t).log() / 4, cond)
        return (slope * x + sd / root * f).to(x.dtype)

    def denoise(self, y: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """EDM's `D(y; sigma)`: the expected data behind `y = x1 + sigma x0` `(B, C, H, W)`, sigma > 0 `(B,)`."""
        check_input(y, sigma, self.shape)
        sigma = sigma.to(working_dtype(sigma))
        variance = (sigma.square() + self.sigma_data**2)[:, None, None, None]
        root = variance.sqrt()
        f = self.model((y / root).to(y.dtype), sigma.log() / 4, cond)
        return (self.sigma_data**2 / variance * y + sigma[:, None, None, None] * self.sigma_data / root * f).to(y.dtype)


def song_unet_cifar10(dropout: float = 0.13, num_classes: int = 0) -> EDMVelocity:
    """EDM's VE network for CIFAR-10: 56,397,827 parameters."""
    return EDMVelocity(SongUNet(dropout=dropout, num_classes=num_classes))


def song_unet_64(dropout: float = 0.25, num_classes: int = 0) -> EDMVelocity:
    """EDM's VE network for AFHQv2 and FFHQ at 64 px: 62,761,091 parameters."""
    return EDMVelocity(SongUNet((3, 64, 64), mult=(1, 2, 2, 2), dropout=dropout, num_classes=num_classes))


def dhariwal_imagenet64(dropout: float = 0.1, num_classes: int = 1000) -> EDMVelocity:
    """EDM's ADM network for ImageNet at 64 px, conditioned on classes: 295,899,267 parameters."""
    return EDMVelocity(DhariwalUNet(dropout=dropout, num_classes=num_classes))
