"""Folders of the models that STARFlow and STARFlow-V stand on, with random weights and of no size."""

import json
import runpy
from pathlib import Path

import numpy as np
import torch
from PIL import Image

PIPELINES = runpy.run_path(str(Path(__file__).parent / "diffusers_pipelines.py"))


def t5(folder: Path) -> Path:
    """T5 with features of 12 numbers and a tokenizer of letters, in one folder as on the hub."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    torch.manual_seed(0)
    letters = PIPELINES["_vocabulary"](["<pad>", "</s>", "<unk>", "\u2581", "(", ")", ":", "1", "6", "\n"])
    config = T5Config(vocab_size=len(letters), d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder)
    T5Tokenizer([(token, -1.0) for token in letters], extra_ids=0).save_pretrained(folder)
    return folder


def image_vae(folder: Path) -> Path:
    """An autoencoder alone, 4 channels, factor 2."""
    PIPELINES["vae"]("AutoencoderKL").save_pretrained(folder)
    return folder


def wan(folder: Path) -> Path:
    """A pipeline's folder whose autoencoder is as that of Wan 2.2: 48 channels, factor 16 with a patch, 4 in time."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    draws = np.random.default_rng(0)
    AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=48,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=draws.normal(0, 0.3, 48).tolist(),
        latents_std=draws.uniform(0.3, 1.2, 48).tolist(),
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    ).save_pretrained(folder / "vae")
    return folder


def pictures(folder: Path, count: int = 10, size: int = 16) -> Path:
    """Pictures with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    draws, lines = np.random.default_rng(0), []
    for n in range(count):
        Image.fromarray(draws.integers(256, size=(size, size, 3), dtype=np.uint8)).save(folder / f"{n:02d}.png")
        lines.append(json.dumps({"file": f"{n:02d}.png", "text": f"picture {'abcdefghij'[n % 10]}"}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


def clips(folder: Path, count: int = 6, frames: int = 9, size: int = 32) -> Path:
    """Folders of frames, named after what they show."""
    draws = np.random.default_rng(0)
    for n in range(count):
        (folder / f"clip {'abcdef'[n]}").mkdir(parents=True)
        for k in range(frames):
            frame = draws.integers(256, size=(size, size, 3), dtype=np.uint8)
            Image.fromarray(frame).save(folder / f"clip {'abcdef'[n]}" / f"{k}.png")
    return folder


def classes(folder: Path, count: int = 12, size: int = 16) -> Path:
    """Pictures in folders of three classes."""
    draws = np.random.default_rng(0)
    for n in range(count):
        (folder / "abc"[n % 3]).mkdir(parents=True, exist_ok=True)
        picture = draws.integers(256, size=(size, size, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / "abc"[n % 3] / f"{n}.png")
    return folder
