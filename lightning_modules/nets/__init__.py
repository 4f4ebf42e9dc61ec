"""Networks: plain nn.Modules called as `net(x, t, cond)` that know nothing of losses, data or Lightning."""

from penstock.lightning_modules.nets.dit import DiT, dit
from penstock.lightning_modules.nets.mlp import MLP
from penstock.lightning_modules.nets.ncsnpp import NCSNpp, ddpmpp_cifar10, ncsnpp_256
from penstock.lightning_modules.nets.unet import UNet

__all__ = ["MLP", "DiT", "NCSNpp", "UNet", "ddpmpp_cifar10", "dit", "ncsnpp_256"]
