"""Pictures of a search for step sizes: the cost matrix with a schedule on it, and the step sizes of several lengths."""

from itertools import pairwise

from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from penstock.lightning_modules.callbacks.pictures import rendered
from penstock.lightning_modules.flow.bellman import Schedules, path_cost, uniform_indices


def draw_costs(found: Schedules, k: int) -> Image.Image:
    """Heat map of `c[i, j]` (logarithmic), the best schedule of k steps as corners on it, equal steps beside it.

    A step from i to j is the dot at (j, i); the staircase leads from one step's end to the next one's start.
    """
    costs = found.costs.triu(1)
    positive = costs[costs > 0]
    figure = Figure(figsize=(6, 5), dpi=100)
    axes = figure.add_subplot()
    if len(positive):
        low = max(float(positive.min()), 1e-6 * float(positive.max()))
        norm = LogNorm(low, max(float(positive.max()), 2 * low))
        shown = costs.clamp(min=low).masked_fill(costs.tril().new_ones(costs.shape).tril().bool(), float("nan"))
        figure.colorbar(
            axes.imshow(shown.numpy(), norm=norm, cmap="viridis"), label="c[i, j]: squared error of one step"
        )
    for path, colour, name in (
        (uniform_indices(k, found.k_max), "white", "equal"),
        (found.path(k), "red", "Bellman"),
    ):
        corners = [(i, i) for i in path[:1]]
        for i, j in pairwise(path):
            corners += [(j, i), (j, j)]
        label = f"{name}, sum {path_cost(found.costs, path):.3g}"
        axes.plot(*zip(*corners), color=colour, lw=1.5, label=label)
        axes.plot(path[1:], path[:-1], "o", color=colour, ms=4)
    axes.plot([0, found.k_max], [0, found.k_max], color="grey", lw=0.5)
    axes.set(xlabel=f"j: to $t_j = j/{found.k_max}$", ylabel=f"i: from $t_i = i/{found.k_max}$")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"Schedules of {k} steps")
    axes.legend(loc="lower left", facecolor="lightgrey")
    return rendered(figure)


def draw_step_sizes(found: Schedules, ks: tuple[int, ...] = (2, 4, 6, 8, 10)) -> Image.Image:
    """Step sizes of the best schedules over time, one line a number of steps."""
    figure = Figure(figsize=(6, 4), dpi=100)
    axes = figure.add_subplot()
    shown = [k for k in ks if k <= found.k_max] or [found.k_max]
    for place, k in enumerate(shown):
        times = [i / found.k_max for i in found.path(k)]
        sizes = [b - a for a, b in pairwise(times)]
        colour = colormaps["viridis"](place / max(1, len(shown)))
        axes.stairs(sizes, times, baseline=None, color=colour, lw=2, label=f"K = {k}")
        axes.hlines(1 / k, 0, 1, color=colour, lw=0.7, ls=":")
    axes.set(xlim=(0, 1), ylim=(0, None), xlabel="t (0 noise, 1 data)", ylabel="step size")
    axes.set_title("Bellman step sizes (dotted: equal steps)")
    axes.legend()
    return rendered(figure)
