"""The loss of data-to-data transfer, measured in the features of a network (t = 0 source, t = 1 data)."""

import torch
from torch import Tensor, nn

from penstock.lightning_modules.flow.losses import FlowLoss, Regression


class FeatureError(FlowLoss):
    """`|J_h(x_t) (dx_t/dt - v(x_t, t))|^2`, mean over features (arXiv 2209.03003 section 5.3).

    `J_h` is the Jacobian of `features` at `x_t`; it is applied by forward-mode differentiation and no gradient flows
    through `x_t` or `features`. With the identity it is the plain loss.

    Args:
        features: `h`, a network of states `(B, ...)` -> `(B, ...)`, rows independent of each other; put into eval mode,
            frozen, moved to where the states are.
    """

    def __init__(self, features: nn.Module):
        self.features = features.eval().requires_grad_(False)

    def __call__(self, r: Regression) -> Tensor:
        self.features.to(r.x_t.device)
        _, moved = torch.func.jvp(self.features, (r.x_t.detach(),), (r.target - r.prediction,))
        return moved.square().flatten(1).mean(1)
