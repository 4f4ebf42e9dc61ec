"""Exact areas under curves of very many scores: counts by value in bounded memory, the same on any number of ranks."""

from collections import Counter

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from penstock.lightning_modules.callbacks.ranks import broadcast, gather
from penstock.lightning_modules.callbacks.score_curve import Measured, ScoreCurve, keys_of
from penstock.lightning_modules.errors import UserError

PAGE, PIECE = 1 << 23, 1 << 20
COUNT = np.uint32
CARRY = 1 << 31
FEW = 1 << 22
EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)


class ScoreCounts:
    """How many normal and anomalous samples have each float32 score, exactly, whatever their number.

    A score is an integer in the order of its size (its bits, the sign turned round), and one page holds the 2^23 of a
    binade: a list of what came until it has 2^22 entries, from then on an array; both take 4 bytes an entry for normal
    samples and 12 for anomalous ones. So a binade takes 134 MB at most, however many scores it holds.

    The regions' overlap needs weights 1/|region| of the anomalous ones, which are summed by score.
    """

    def __init__(self) -> None:
        self.pages: dict[int, tuple[_Column, _Column]] = {}
        self.normal = self.anomalous = self.regions = self._since = 0

    def update(
        self, scores: NDArray[np.float32], truth: NDArray[np.bool_], weights: NDArray[np.float64] | None = None
    ) -> None:
        """Adds scores.

        Args:
            scores: any shape, finite; larger = more anomalous.
            truth: which are of anomalous samples; same shape.
            weights: of these, `truth.sum()` of them in the order of `scores[truth]`; None is 1 each.

        Raises:
            UserError: a score is not finite.
        """
        scores, truth = np.asarray(scores, np.float32).ravel(), np.asarray(truth, bool).ravel()
        if not np.isfinite(scores).all():
            raise UserError(f"score: {scores[~np.isfinite(scores)][0]} found, expected finite scores")
        keys = keys_of(scores)
        anomalous = keys[truth]
        normal = keys[~truth] if len(anomalous) else keys
        self.normal, self.anomalous = self.normal + len(normal), self.anomalous + len(anomalous)
        self._add(0, normal, None)
        self._add(1, anomalous, np.ones(len(anomalous)) if weights is None else weights)

    def update_map(self, scores: NDArray[np.float32], mask: NDArray[np.bool_]) -> None:
        """Adds the pixels `(H, W)` of one image; its regions are the 8-connected ones of `mask`."""
        if not mask.any():
            return self.update(scores, mask)
        labels, regions = ndimage.label(mask, EIGHT_NEIGHBOURS)
        labels = labels[mask]
        self.regions += regions
        self.update(scores, mask, 1 / np.bincount(labels)[labels])

    def _add(self, column: int, keys: NDArray[np.uint32], weights: NDArray[np.float64] | None) -> None:
        for first in range(0, len(keys), CARRY):
            block = keys[first : first + CARRY]
            if self._since + len(block) > CARRY:
                self._since = 0
                for normal, anomalous in self.pages.values():
                    normal.carry()
                    anomalous.carry()
            self._since += len(block)
            numbers = block // PAGE
            several = numbers.min() < numbers.max()
            for number in np.flatnonzero(np.bincount(numbers)).tolist():
                columns = self.pages.setdefault(number, _empty_page())
                here = numbers == number if several else slice(None)
                own = () if weights is None else (weights[first : first + CARRY][here],)
                columns[column].add(block[here] % PAGE, *own)

    def measure(self, limit: float = 0.3, at: float | None = None) -> Measured | None:
        """The metrics over all ranks, on each of them; None without scores. All ranks must call it.

        Rank 0 adds the ranks' counts up from the largest score down, in pieces of 2^20 possible scores.

        Args:
            limit: FPR up to which the regions' overlap is integrated, in (0, 1].
            at: threshold of `f1`.
        """
        parts = gather((self.normal, self.anomalous, self.regions, self._used()))
        curve = bundles = None
        if parts is not None:
            normal, anomalous, regions, used = zip(*parts)
            curve, bundles = ScoreCurve(sum(normal), sum(anomalous), sum(regions), limit, at), _bundles(used)
        for bundle in broadcast(bundles):
            held = gather([self._piece(base) for base in bundle])
            if curve is not None and held is not None:
                for base, *pieces in zip(bundle, *held):
                    curve.extend(base, *_summed(pieces))
        return broadcast(None if curve is None else curve.measured())

    def _used(self) -> Counter[int]:
        """The first possible scores of the pieces that may not be empty, and how many scores they hold at most."""
        used: Counter[int] = Counter()
        for page, columns in self.pages.items():
            for column in columns:
                used.update({page * PAGE + first: entries for first, entries in column.used()})
        return used

    def _piece(self, base: int) -> tuple[NDArray, ...]:
        """Which possible scores from `base` were met, and their counts and weights."""
        page = self.pages.get(base // PAGE) or _empty_page()
        (normal_at, normal, _), (anomalous_at, anomalous, weights) = (column.read(base % PAGE) for column in page)
        return _summed(
            [
                (normal_at, normal, np.zeros(len(normal), np.int64), np.zeros(len(normal))),
                (anomalous_at, np.zeros(len(anomalous), np.int64), anomalous, weights),
            ]
        )


class _Column:
    """Counts, and sums of weights where there are any, by score of one page."""

    def __init__(self, weighted: bool):
        self.held = 0
        self.list: list[NDArray] = [np.empty(0, np.uint32), *([np.empty(0)] if weighted else [])]
        self.counts: NDArray | None = None
        self.weights: NDArray[np.float64] | None = None
        self.carried: dict[int, int] = {}

    def add(self, *columns: NDArray) -> None:
        """Places in the page, repeated or not, and their weights."""
        if self.counts is None and self.held + len(columns[0]) < FEW:
            self.list = [_appended(old, self.held, new) for old, new in zip(self.list, columns)]
            self.held += len(columns[0])
            return
        if self.counts is None:
            self.counts, self.weights = np.zeros(PAGE, COUNT), np.zeros(PAGE) if len(columns) > 1 else None
            self._count(*(old[: self.held] for old in self.list))
            self.list = []
        self._count(*columns)

    def _count(self, keys: NDArray[np.uint32], weights: NDArray[np.float64] | None = None) -> None:
        np.add.at(self.counts, keys, COUNT(1))
        if weights is not None:
            np.add.at(self.weights, keys, weights)

    def carry(self) -> None:
        """Sets what would soon overflow aside."""
        if self.counts is not None:
            for key in np.flatnonzero(self.counts >= CARRY).tolist():
                self.counts[key] -= COUNT(CARRY)
                self.carried[key] = self.carried.get(key, 0) + CARRY

    def used(self) -> list[tuple[int, int]]:
        """The first places of the pieces that may not be empty, and how many places of them are met at most."""
        if self.counts is not None:
            return [(first, PIECE) for first in range(0, PAGE, PIECE)]
        entries = np.bincount(self.list[0][: self.held] // PIECE)
        return [(int(piece) * PIECE, min(int(entries[piece]), PIECE)) for piece in np.flatnonzero(entries)]

    def read(self, first: int) -> tuple[NDArray, NDArray[np.int64], NDArray[np.float64]]:
        """Those met of the `PIECE` places from `first`, counted from there; their counts and sums of weights."""
        if self.counts is None:
            keys, *weights = (column[: self.held] for column in self.list)
            here = keys // PIECE == first // PIECE
            return _counted(keys[here] - np.uint32(first), *(column[here] for column in weights))
        counts = self.counts[first : first + PIECE].astype(np.int64)
        for key, count in self.carried.items():
            if first <= key < first + PIECE:
                counts[key - first] += count
        met = np.flatnonzero(counts)
        weights = np.zeros(len(met)) if self.weights is None else self.weights[first + met]
        return met, counts[met], weights


def _bundles(used: tuple[Counter[int], ...]) -> list[list[int]]:
    """Pieces from the largest scores down, in lists of at most `PIECE` scores of all ranks, or of one piece."""
    total, bundles, entries = sum(used, Counter()), [], PIECE
    for base in sorted(total, reverse=True):
        if entries + total[base] > PIECE:
            bundles.append([])
            entries = 0
        bundles[-1].append(base)
        entries += total[base]
    return bundles


def _summed(held: list[tuple[NDArray, ...]]) -> tuple[NDArray, ...]:
    """Of several `(met, *columns)` one, the columns added up."""
    if len(held) == 1:
        return held[0]
    columns = [np.concatenate(column) for column in zip(*held)]
    order = np.argsort(columns[0], kind="stable")
    met, *columns = [column[order] for column in columns]
    starts = np.flatnonzero(np.diff(met, prepend=-1))
    return met[starts], *(np.add.reduceat(column, starts) if len(starts) else column for column in columns)


def _empty_page() -> tuple[_Column, _Column]:
    return _Column(weighted=False), _Column(weighted=True)


def _appended(column: NDArray, held: int, new: NDArray) -> NDArray:
    """`column` with `new` from place `held`, in a larger array where it has no room: few large pieces of memory."""
    if held + len(new) > len(column):
        column, old = np.empty(max(held + len(new), 2 * held, 1 << 12), column.dtype), column
        column[:held] = old[:held]
    column[held : held + len(new)] = new
    return column


def _counted(keys: NDArray, weights: NDArray | None = None) -> tuple[NDArray, NDArray[np.int64], NDArray[np.float64]]:
    """Different keys, how often each comes, and the sums of their weights; many by tables, few by sorting."""
    if len(keys) > PIECE // 32:
        counts = np.bincount(keys)
        met = np.flatnonzero(counts)
        return met, counts[met], np.zeros(len(met)) if weights is None else np.bincount(keys, weights)[met]
    met, place, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return met, counts, np.zeros(len(met)) if weights is None else np.bincount(place, weights, len(met))
