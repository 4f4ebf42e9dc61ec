"""`penstock encode experiment=... out=FOLDER`: the data's pictures as latents on disk, with their captions.

The words are those of `fit`; besides, `autoencoder=PATH` names the autoencoder where the model has none.
"""

import os
from pathlib import Path
from typing import Any

from penstock.lightning_modules.cli.compose import compose
from penstock.lightning_modules.cli.given import typed, usable_device
from penstock.lightning_modules.errors import UserError, did_you_mean

OWN = {"out": str, "autoencoder": str, "batch": int, "shard": int, "dtype": str, "device": str}
DTYPES = ("float16", "float32")


def run_encode(words: list[str]) -> int:
    """Encodes what is missing; exit code 0. Under torchrun the ranks share the work.

    Raises:
        UserError: an unknown word, a wrong type or range, no autoencoder, bad data, a folder of other latents, a full
            disk.
    """
    own = {key: value for key, _, value in (word.partition("=") for word in words) if key in OWN}
    options: dict[str, Any] = {key: typed(key, value, OWN[key]) for key, value in own.items()}
    if "out" not in options:
        raise UserError("encode: out=FOLDER is required, a new one or one that an earlier call left")
    if (dtype := options.get("dtype", DTYPES[0])) not in DTYPES:
        raise UserError(f"dtype={dtype}: expected one of {', '.join(DTYPES)}{did_you_mean(dtype, DTYPES)}")
    tree, _ = compose([word for word in words if word.partition("=")[0] not in OWN])
    config = tree["model"].get("init_args", {}).get("autoencoder")
    if "autoencoder" in options:
        path = options.pop("autoencoder")
        config = {"class_path": "penstock.lightning_modules.weights.latents.Latents", "init_args": {"path": path}}
    if not config:
        raise UserError("encode: the model has no autoencoder; expected autoencoder=PATH, a folder or a hub name")

    import torch
    import torch.distributed as dist
    from tqdm import tqdm

    from penstock.lightning_modules.build import build
    from penstock.lightning_modules.encoding import Encoder

    folder, device = Path(options.pop("out")), options.pop("device", None)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device is not None:
        usable_device(device)
    else:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    (data,) = build(tree, "data")
    encoder = Encoder(data, _autoencoder(config), device=device, **options)
    if world > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    count = len(encoder.numbers)
    try:
        with tqdm(total=count, desc="encode", unit="sample", disable=rank > 0, mininterval=1) as bar:
            barrier = dist.barrier if world > 1 else lambda: None
            encoder.write(folder, rank=rank, world=world, barrier=barrier, tick=bar.update)
    finally:
        if world > 1:
            dist.destroy_process_group()
    if rank == 0:
        shapes = ", ".join("x".join(map(str, shape)) for shape in encoder.shapes)
        print(f"{count} latents of {shapes}: {folder}")
    return 0


def _autoencoder(config: dict[str, Any]) -> Any:
    from jsonargparse import ArgumentError, ArgumentParser

    from penstock.lightning_modules.cli.explain import explain
    from penstock.lightning_modules.nets.autoencoder import Autoencoder

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Autoencoder, "autoencoder")
    try:
        return parser.instantiate_classes(parser.parse_object({"autoencoder": config}))["autoencoder"]
    except ArgumentError as error:
        raise UserError(explain(error)) from error
