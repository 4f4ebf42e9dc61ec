"""`penstock pairs ckpt_path=... n=6000 steps=20`: pairs of noise and samples of a trained flow, in shards on disk."""

import os
from pathlib import Path

from penstock.lightning_modules.cli.given import check_keys, solver_config, split, typed
from penstock.lightning_modules.errors import UserError

KEYS = {"ckpt_path": str, "n": int, "steps": int, "solver": str, "guidance": float, "seed": int}
KEYS |= {"batch": int, "shard": int, "out": str, "device": str}


def run_pairs(words: list[str]) -> int:
    """Makes the pairs that are missing; exit code 0. Under torchrun the ranks share the work.

    Raises:
        UserError: an unknown word, a wrong type or range, a bad checkpoint, a folder of other pairs, a full disk.
    """
    given = split("pairs", words, KEYS)
    check_keys("pairs", given, KEYS)
    options = {key: typed(key, value, KEYS[key]) for key, value in given.items()}
    teacher = Path(options.pop("ckpt_path"))
    out, device = options.pop("out", None), options.pop("device", None)
    solver = solver_config(options.pop("solver")) if "solver" in options else None

    import torch
    import torch.distributed as dist
    from tqdm import tqdm

    from penstock.lightning_modules.build import build_solver
    from penstock.lightning_modules.pairs import PairMaker, Recipe, default_folder, write_pairs

    try:
        recipe = Recipe(**{"n": 6000, **options}, solver=build_solver(solver) if solver else None)
    except ValueError as error:
        raise UserError(str(error)) from error
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device is None:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if world > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    maker = PairMaker(teacher, recipe, device)
    folder = Path(out) if out else default_folder(maker)
    try:
        with tqdm(total=recipe.n, desc="pairs", unit="pair", disable=rank > 0, mininterval=1) as bar:
            write_pairs(
                maker,
                folder,
                rank=rank,
                world=world,
                barrier=dist.barrier if world > 1 else lambda: None,
                tick=bar.update,
            )
    finally:
        if world > 1:
            dist.destroy_process_group()
    if rank == 0:
        print(f"{recipe.n} pairs: {folder}")
    return 0
