"""Distances between two sets of features, in float64 on the device of the arguments."""

import torch
from torch import Tensor
from torch_fidelity.metric_prc import calculate_precision_recall_part
from torchmetrics.image.kid import poly_kernel

from penstock.lightning_modules.callbacks.ranks import largest, sum_over_ranks


class GaussianSums:
    """Count, sum and sum of outer products of features, in float64: all that a Gaussian fit needs.

    Adding the sums of parts gives the sums of the whole, whatever the sizes of the parts.
    """

    def __init__(self, count: int = 0, total: Tensor | None = None, outer: Tensor | None = None):
        """Begins from nothing, or from stored sums `total` `(D,)` and `outer` `(D, D)`."""
        self.count, self.total, self.outer = count, total, outer

    def update(self, features: Tensor) -> None:
        """Adds `(b, D)` features. The sums stay on their device, or on the CPU if that has no float64."""
        features = (features.cpu() if features.device.type == "mps" else features).double()
        total, outer = features.sum(0), features.T @ features
        self.count += len(features)
        self.total = total if self.total is None else self.total + total
        self.outer = outer if self.outer is None else self.outer + outer

    def over_ranks(self, device: torch.device) -> "GaussianSums":
        """The sums over all ranks, on the CPU of each; `device` is where a rank that saw no features puts its zeros."""
        width = largest(0 if self.total is None else len(self.total))
        if self.total is None:
            flat = torch.zeros(1 + width + width**2, dtype=torch.float64, device=device)
        else:
            flat = torch.cat([self.total.new_tensor([self.count]), self.total, self.outer.flatten()])
        flat = sum_over_ranks(flat).cpu()
        return GaussianSums(int(flat[0]), flat[1 : 1 + width], flat[1 + width :].view(width, width))

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean `(D,)` and unbiased covariance `(D, D)`.

        Raises:
            ValueError: for fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, found {self.count}")
        mean = self.total / self.count
        return mean, (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)


def _factor(covariance: Tensor) -> Tensor:
    """`F` `(D, r)` with `F F^T` the covariance; eigenvalues below the largest's rounding error count as 0."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    present = values > len(values) * torch.finfo(values.dtype).eps * values.abs().amax()
    return vectors[:, present] * values[present].sqrt()


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Squared 2-Wasserstein distance of two Gaussians (arXiv 1706.08500, eq. 6).

    `|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`. With `C = F F^T` the trace of the last root is the sum of the
    singular values of `F_a^T F_b`, which are never negative or complex, also for singular covariances.

    Args:
        mean_a: `(D,)` float64.
        cov_a: `(D, D)` float64, symmetric.
        mean_b: `(D,)` float64.
        cov_b: `(D, D)` float64, symmetric.
    """
    overlap = torch.linalg.svdvals(_factor(cov_a).T @ _factor(cov_b)).sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * overlap)


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """Squared maximum mean discrepancy with the kernel `(x.y / D + 1)^3`, unbiased (KID, arXiv 1801.01401, section 4).

    Taken over all pairs at once: the value that the usual average over random subsets estimates.

    Args:
        real: `(n, D)`, n >= 2.
        fake: `(m, D)`, m >= 2.

    Raises:
        ValueError: for fewer than two rows.
    """
    if min(len(real), len(fake)) < 2:
        raise ValueError(f"a kernel distance needs at least 2 samples of each kind, found {len(real)} and {len(fake)}")
    real, fake = real.double(), fake.double()

    def mean(a: Tensor, b: Tensor) -> Tensor:
        total = sum(poly_kernel(rows, b).sum() for rows in a.split(1000))
        if a is b:
            total = total - ((a.square().sum(1) / a.shape[1] + 1) ** 3).sum()
            return total / (len(a) * (len(a) - 1))
        return total / (len(a) * len(b))

    return float(mean(real, real) + mean(fake, fake) - 2 * mean(real, fake))


def precision_recall(real: Tensor, fake: Tensor) -> tuple[float, float]:
    """Improved precision and recall with 3 neighbours (arXiv 1904.06991, eq. 2), by torch-fidelity.

    Args:
        real: `(n, D)`, n >= 4.
        fake: `(m, D)`, m >= 4.

    Returns:
        Share of fake samples inside the real manifold, share of real samples inside the fake manifold.

    Raises:
        ValueError: for fewer than four rows.
    """
    if min(len(real), len(fake)) < 4:
        raise ValueError(f"precision and recall need at least 4 samples of each, found {len(real)} and {len(fake)}")
    return calculate_precision_recall_part(fake.double(), real.double(), neighborhood=3, batch_size=2000)
