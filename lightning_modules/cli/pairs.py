"""`penstock pairs ckpt_path=... n=6000 steps=20`: pairs of noise and samples of a trained flow, in shards on disk.

`penstock pairs from=FOLDER out=FOLDER` takes them from a folder that an official repository wrote.
"""

import os
from pathlib import Path

from penstock.lightning_modules.cli.given import check_keys, pieces, solver_config, split, typed, usable_device
from penstock.lightning_modules.errors import UserError

KEYS = {"ckpt_path": str, "n": int, "steps": int, "solver": str, "guidance": float, "seed": int}
KEYS |= {"batch": int, "shard": int, "out": str, "device": str}
IMPORT = {"from": str, "out": str, "shard": int}


def run_pairs(words: list[str]) -> int:
    """Makes the pairs that are missing; exit code 0. Under torchrun the ranks share the work.

    Raises:
        UserError: an unknown word, a wrong type or range, a bad checkpoint, a folder of other pairs, a full disk.
    """
    if any(word.startswith("from=") for word in words):
        return _take_over(words)
    given = split("pairs", words, KEYS)
    check_keys("pairs", given, KEYS)
    if not given.get("steps", "1").lstrip("+-").isdigit():
        raise UserError(f"steps={given['steps']}: pairs take a whole number of equal steps, expected such as steps=20")
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
    if device is not None:
        usable_device(device)
    else:
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


def _take_over(words: list[str]) -> int:
    given = pieces("pairs", words, IMPORT)
    if "ckpt_path" in given:
        raise UserError("pairs: from and ckpt_path exclude each other; expected one of them")
    check_keys("pairs", given, IMPORT)
    options = {key: typed(key, value, IMPORT[key]) for key, value in given.items()}
    if "out" not in options:
        raise UserError(f"pairs from={options['from']}: out=FOLDER is required, a new one for pairs of our form")

    from tqdm import tqdm

    from penstock.lightning_modules.official_pairs import OfficialPairs
    from penstock.lightning_modules.pairs import write_pairs

    try:
        found = OfficialPairs(options["from"], options.get("shard", 1000))
    except ValueError as error:
        raise UserError(str(error)) from error
    with tqdm(total=found.recipe.n, desc="pairs", unit="pair", mininterval=1) as bar:
        write_pairs(found, Path(options["out"]), tick=bar.update)
    print(f"{found.recipe.n} pairs of {found.shape}: {options['out']}")
    return 0
