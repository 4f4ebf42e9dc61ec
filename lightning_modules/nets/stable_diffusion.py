"""The U-Net of Stable Diffusion as a velocity field (t = 0 noise, t = 1 data)."""

from typing import Literal

import torch
from torch import Tensor, nn

from penstock.lightning_modules.nets.condition import check_input

BLOCKS = ("ResnetBlock2D", "Transformer2DModel")
Reading = Literal["velocity", "noise"]


class StableDiffusion(nn.Module):
    """Reads a `UNet2DConditionModel` as `net(x, t, cond)` with prompt features `cond` `(B, L, E)`.

    `velocity`: the output is the velocity, asked at the network time `1000 (1 - t)`, a float that starts at 1000
    (InstaFlow, arXiv 2309.06380, official sampler).

    `noise`: the output is the noise `eps` of a variance-preserving diffusion, `x_vp = a x1 + s x0`,
    `a = sqrt(alphas_cumprod)`, `a^2 + s^2 = 1`, carried over exactly: the straight path has the same ratio of data to
    noise at `t = a / (a + s)`, where `x_t = x_vp / (a + s)` and `v = (x_vp - s eps) / a - eps`. The network time comes
    from linear interpolation in `log(a / s) = logit(t)`. Before the noisiest level `t_min` (0.064 in Stable
    Diffusion 1.5) the network is asked there, and `v = (D - x_t) / (1 - t)` heads for its data prediction `D`. After
    the cleanest level (0.972) its answer at that level stands, which only a solver with a stage there meets: `times`
    takes the last step from that level to 1.

    Args:
        unet: `unet(x, times, encoder_hidden_states=, return_dict=False) -> (output,)`, times `(B,)` float.
        null_text: features of the empty prompt `(L, E)`, the condition of the unconditional branch.
        shape: (C, H, W) of the latents.
        reading: what the output means.
        alphas_cumprod: `(T,)` of the diffusion's training, decreasing; needed for `noise`.

    Attributes:
        t_min: first time of the flow at which the network knows the noise level; 0 for `velocity`.

    Raises:
        ValueError: `noise` without `alphas_cumprod`.
    """

    num_classes = 0

    def __init__(
        self,
        unet: nn.Module,
        null_text: Tensor,
        shape: tuple[int, int, int],
        reading: Reading = "velocity",
        alphas_cumprod: Tensor | None = None,
    ):
        super().__init__()
        self.unet, self.shape, self.reading, self.t_min = unet, tuple(shape), reading, 0.0
        self.checkpoint_blocks = tuple({type(part) for part in unet.modules() if type(part).__name__ in BLOCKS})
        self.register_buffer("null_text", null_text, persistent=False)
        if reading == "noise":
            if alphas_cumprod is None:
                raise ValueError("StableDiffusion: the reading 'noise' needs alphas_cumprod")
            self.register_buffer("levels", 0.5 * torch.logit(alphas_cumprod.double()).flip(0), persistent=False)
            self.t_min = float(torch.sigmoid(self.levels[0]))

    def drop_condition(self, cond: Tensor, mask: Tensor) -> Tensor:
        """`cond` `(B, L, E)` with the empty prompt where `mask` `(B,)` is true."""
        if cond.ndim != 3 or cond.shape[1:] != self.null_text.shape:
            raise ValueError(f"expected prompt features (B, {_plain(self.null_text)}), got {tuple(cond.shape)}")
        return torch.where(mask[:, None, None], self.null_text.to(cond), cond)

    def times(self, steps: int) -> Tensor:
        """`(steps + 1,)` float64 times of equal steps in the network's own time, from `t_min` to 1."""
        if self.reading == "velocity":
            return torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        place = torch.linspace(0, len(self.levels) - 1, steps + 1, dtype=torch.float64)
        left = place.floor().long().clamp(max=len(self.levels) - 2)
        levels = self.levels.cpu()
        times = torch.sigmoid(torch.lerp(levels[left], levels[left + 1], place - left))
        times[-1] = 1.0
        return times

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Velocity `(B, C, H, W)` at `x` `(B, C, H, W)` and times `t` `(B,)`; `cond` None is the empty prompt."""
        check_input(x, t, self.shape)
        cond = self.null_text.expand(len(x), -1, -1) if cond is None else cond
        if self.reading == "velocity":
            return self._ask(x, 1000 * (1 - t), cond)
        known = t.clamp(min=self.t_min).double()
        a, s, here = (value.to(x.dtype)[:, None, None, None] for value in (known, 1 - known, t))
        norm = torch.hypot(a, s)
        x_vp = x / torch.hypot(here, 1 - here)
        eps = self._ask(x_vp, self._network_time(known).to(t.dtype), cond)
        data = (x_vp * norm - s * eps) / a
        late = here >= self.t_min
        return torch.where(late, data - eps, (data - x) / torch.where(late, 1, 1 - here))

    def _ask(self, x: Tensor, times: Tensor, cond: Tensor) -> Tensor:
        return self.unet(x, times, encoder_hidden_states=cond.to(x.dtype), return_dict=False)[0]

    def _network_time(self, t: Tensor) -> Tensor:
        last = len(self.levels) - 1
        level = torch.logit(t)
        right = torch.searchsorted(self.levels, level).clamp(1, last)
        low, high = self.levels[right - 1], self.levels[right]
        return last - (right - 1 + ((level - low) / (high - low)).clamp(0, 1))


def _plain(value: Tensor) -> str:
    return ", ".join(map(str, value.shape))
