"""Moving digits under noise: the best linear-Gaussian predictor of each frame from those before it, in closed form.

`python -m penstock.benchmarks.moving_digits_gaussian --threads 1` writes nats a dimension of test clips for predictors
that see none, one, two, three or all frames before: what `penstock fit experiment=starflow_v_moving_digits` has to be
better than. Noise and training clips are those of the experiment; the test clips show other digits.
"""

import sys
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from penstock.benchmarks.gaussian_laws import fit, frame_nats
from penstock.benchmarks.report import parser, write
from penstock.datamodules.moving_digits import MovingDigits

ORDERS = {"none": 0, "one": 1, "two": 2, "three": 3}


def clips(data: MovingDigits, split: str) -> Tensor:
    """Clips of a split without noise `(n, T, D)`."""
    return torch.cat([batch["video"].flatten(2) for batch in data.reference_dataloader(split)])


def nats(data: MovingDigits, variance: float) -> dict[str, float]:
    """Nats a dimension of the test clips, by what the predictor sees."""
    data.prepare_data()
    data.setup()
    test = clips(data, "test")
    law = fit(clips(data, "train").flatten(1), variance)
    frames, size = range(test.shape[1]), test.shape[2]
    found = {
        name: fmean(float(frame_nats(law, test, t, order, variance).mean()) / size for t in frames)
        for name, order in ORDERS.items()
    }
    return found | {"all before it": float(law.nats(test.flatten(1).double(), variance).mean()) / test[0].numel()}


def main(argv: Sequence[str] | None = None) -> int:
    """Fits, scores and writes `moving_digits_gaussian.json` and `.md`."""
    options = parser(__doc__)
    options.add_argument("--n-train", type=int, default=20_000, help="training clips")
    options.add_argument("--n-test", type=int, default=1000, help="test clips")
    options.add_argument("--frames", type=int, default=16, help="of a clip")
    options.add_argument("--speeds", type=int, nargs="+", default=[1, 2], help="pixels a frame")
    options.add_argument("--noise", type=float, default=0.2, help="standard deviation of the noise on clips in [-1, 1]")
    given = options.parse_args(argv)
    if given.threads:
        torch.set_num_threads(given.threads)
    sizes = {"frames": given.frames, "n_train": given.n_train, "n_test": given.n_test, "seed": given.seed}
    found = {speed: nats(MovingDigits(speed=speed, **sizes), given.noise**2) for speed in given.speeds}
    rows = [
        {"frames seen": name, **{f"{speed} px a frame": f"{found[speed][name]:.4f}" for speed in given.speeds}}
        for name in found[given.speeds[0]]
    ]
    title = (
        f"Moving digits with noise of {given.noise}: nats a dimension of the best linear-Gaussian predictor of a frame"
    )
    write("moving_digits_gaussian", sizes | {"noise": given.noise}, rows, title=title, seed=given.seed, out=given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
