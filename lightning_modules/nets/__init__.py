"""Networks: plain nn.Modules called as `net(x, t, cond)` that know nothing of losses, data or Lightning."""
