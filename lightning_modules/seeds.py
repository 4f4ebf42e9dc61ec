"""The seed of a run."""

import os


def run_seed() -> int:
    """What `seed_everything` left in the environment, else 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))
