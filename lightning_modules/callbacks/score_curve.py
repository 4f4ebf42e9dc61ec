"""Areas under curves from counts by score, one pass from the largest score down."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Measured(NamedTuple):
    """What counts of scores say; None is undefined.

    Attributes:
        normal: number of normal samples.
        anomalous: of anomalous ones.
        lowest: smallest score.
        highest: largest score.
        auroc: area under the ROC curve, ties count a half; None without scores of both kinds.
        ap: average precision, `sum (R_n - R_{n-1}) P_n` as in scikit-learn.
        f1_max: largest F1.
        threshold: the largest score with this F1; scores at or above it are called anomalous.
        f1: F1 at a given threshold.
        aupro: area under the per-region overlap up to an FPR, over that FPR, in [0, 1]; None without regions.
    """

    normal: int
    anomalous: int
    lowest: float
    highest: float
    auroc: float | None = None
    ap: float | None = None
    f1_max: float | None = None
    threshold: float | None = None
    f1: float | None = None
    aupro: float | None = None


class ScoreCurve:
    """Running totals of counts from the largest score down.

    Args:
        normal: number of normal samples.
        anomalous: of anomalous ones.
        regions: of regions, whose samples weigh 1/|region| each; 0 without.
        limit: FPR up to which the regions' overlap is integrated, in (0, 1].
        at: threshold of `f1`, or None.
    """

    def __init__(self, normal: int, anomalous: int, regions: int, limit: float, at: float | None):
        self.normal, self.anomalous, self.regions, self.limit, self.at = normal, anomalous, regions, limit, at
        self.false, self.true, self.overlap = 0, 0, 0.0
        self.highest: int | None = None
        self.lowest = 0
        self.area = self.ap = self.pro = 0.0
        self.f1_max, self.threshold, self.f1 = 0.0, 0, 0.0

    def extend(self, base: int, met: NDArray, normal: NDArray, anomalous: NDArray, weights: NDArray) -> None:
        """Goes on to smaller scores.

        Args:
            base: added to `met`.
            met: rising; integers of scores, see `keys_of`.
            normal: how many normal samples have each of them.
            anomalous: how many anomalous ones.
            weights: the sums of the weights of these.
        """
        if not len(met):
            return
        keys = base + met[::-1].astype(np.int64)
        normal, anomalous, weights = normal[::-1], anomalous[::-1], weights[::-1]
        self.highest = int(keys[0]) if self.highest is None else self.highest
        self.lowest = int(keys[-1])
        false, true = self.false + np.cumsum(normal), self.true + np.cumsum(anomalous)
        if self.normal and self.anomalous:
            self.area += float(normal @ (true - anomalous / 2))
            self.ap += float(anomalous @ (true / (true + false)))
            f1 = 2 * true / (true + false + self.anomalous)
            best = int(f1.argmax())
            if f1[best] > self.f1_max:
                self.f1_max, self.threshold = float(f1[best]), int(keys[best])
            called = 0 if self.at is None else int(np.searchsorted(-keys, -key_of(self.at), side="right"))
            self.f1 = float(f1[called - 1]) if called else self.f1
        if self.normal and self.regions:
            overlap = self.overlap + np.cumsum(weights)
            self._integrate(np.append(self.false, false) / self.normal, np.append(self.overlap, overlap) / self.regions)
            self.overlap = float(overlap[-1])
        self.false, self.true = int(false[-1]), int(true[-1])

    def _integrate(self, rate: NDArray[np.float64], overlap: NDArray[np.float64]) -> None:
        inside = int(np.searchsorted(rate, self.limit, side="right"))
        if not inside:
            return
        overlap = np.minimum(overlap, 1)
        if inside < len(rate):
            last = np.interp(self.limit, rate[inside - 1 : inside + 1], overlap[inside - 1 : inside + 1])
            rate, overlap = np.append(rate[:inside], self.limit), np.append(overlap[:inside], last)
        self.pro += float(np.diff(rate) @ (overlap[1:] + overlap[:-1])) / 2

    def measured(self) -> Measured | None:
        """After the smallest score; None if there was none."""
        if self.highest is None:
            return None
        known = self.normal, self.anomalous, score_of(self.lowest), score_of(self.highest)
        aupro = min(self.pro / self.limit, 1.0) if self.normal and self.regions else None
        if not (self.normal and self.anomalous):
            return Measured(*known)
        area, ap = self.area / (self.normal * self.anomalous), self.ap / self.anomalous
        f1 = None if self.at is None else self.f1
        return Measured(*known, area, ap, self.f1_max, score_of(self.threshold), f1, aupro)


def keys_of(scores: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Integers in the order of finite float32 scores; -0 is 0."""
    bits = (scores + np.float32(0)).view(np.int32)
    return (bits ^ ((bits >> 31) | np.int32(-(1 << 31)))).view(np.uint32)


def key_of(score: float) -> int:
    """The smallest integer of a float32 score that is not below `score`."""
    nearest = np.float32(score)
    up = np.nextafter(nearest, np.float32(np.inf)) if float(nearest) < score else nearest
    return int(keys_of(np.array([up], np.float32))[0])


def score_of(key: int) -> float:
    """The score of an integer."""
    bits = np.uint32(key ^ (1 << 31) if key >> 31 else key ^ 0xFFFFFFFF)
    return float(bits.view(np.float32))
