"""Pipelines' folders as diffusers writes them, with random weights and of no size: 16x16 images, 8x8x4 latents."""

from pathlib import Path
from typing import Any

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def vae(kind: str, seed: int = 0) -> torch.nn.Module:
    """A random autoencoder of diffusers; shift, scale and statistics are not those that it has by default."""
    import diffusers

    kl = {"norm_num_groups": 4, "latent_channels": 4, "sample_size": 16, "block_out_channels": (8, 8)}
    kl |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    kl |= {"scaling_factor": 1.5, "shift_factor": 0.06}
    frames = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [True]}
    frames |= {"latents_mean": [-0.7, 0.1, 0.9, 0.0], "latents_std": [2.8, 1.4, 0.5, 1.0]}
    wan = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "decoder_base_dim": 8}
    wan |= {"scale_factor_spatial": 4, "scale_factor_temporal": 2}
    dc = {"latent_channels": 4, "attention_head_dim": 4, "scaling_factor": 0.4}
    for side in ("encoder", "decoder"):
        dc |= {f"{side}_block_types": "ResBlock", f"{side}_block_out_channels": (8, 8)}
        dc |= {f"{side}_layers_per_block": (1, 1), f"{side}_qkv_multiscales": ((), ())}
    options = {
        "AutoencoderKL": kl,
        "AutoencoderDC": dc,
        "AutoencoderKLQwenImage": frames,
        "AutoencoderKLWan": {**frames, **wan, "dim_mult": [1, 1]},
    }
    torch.manual_seed(seed)
    return getattr(diffusers, kind)(**options[kind])


def write(folder: Path, host: str, transformer: torch.nn.Module) -> Path:
    """A pipeline of `host` with all its parts, and prompts of letters; `transformer` takes features of 12 numbers."""
    torch.manual_seed(0)
    {"StableDiffusion3": _stable_diffusion_3, "Sana": _sana, "QwenImage": _qwen_image}[host](folder, transformer)
    return folder


def _stable_diffusion_3(folder: Path, transformer: torch.nn.Module) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        T5Config,
        T5EncoderModel,
        T5Tokenizer,
    )

    vocab = _vocabulary(["<|startoftext|>", "<|endoftext|>"], "</w>")
    clip = CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=6,
        intermediate_size=8,
        projection_dim=10,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=20,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    letters = _vocabulary(["<pad>", "</s>", "<unk>", "\u2581"])
    t5 = T5Config(vocab_size=len(letters), d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    encoders = {
        "text_encoder": CLIPTextModelWithProjection(clip),
        "text_encoder_2": CLIPTextModelWithProjection(clip),
        "text_encoder_3": T5EncoderModel(t5),
        "tokenizer": CLIPTokenizer(vocab, [], model_max_length=20),
        "tokenizer_2": CLIPTokenizer(vocab, [], model_max_length=20),
        "tokenizer_3": T5Tokenizer([(token, -1.0) for token in letters], extra_ids=0),
    }
    scheduler = FlowMatchEulerDiscreteScheduler()
    StableDiffusion3Pipeline(transformer, scheduler, vae("AutoencoderKL"), **encoders).save_pretrained(folder)


def _sana(folder: Path, transformer: torch.nn.Module) -> None:
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    vocab = _vocabulary(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581"])
    gemma = Gemma2Config(
        vocab_size=len(vocab),
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=6,
    )
    parts: dict[str, Any] = {"tokenizer": GemmaTokenizer(vocab, []), "text_encoder": Gemma2Model(gemma)}
    parts |= {"vae": vae("AutoencoderDC"), "scheduler": DPMSolverMultistepScheduler()}
    SanaPipeline(transformer=transformer, **parts).save_pretrained(folder)


def _qwen_image(folder: Path, transformer: torch.nn.Module) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    vocab = _vocabulary(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "\u0120", "\u010a"])
    text = {"vocab_size": len(vocab), "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 1]}, "bos_token_id": 0, "eos_token_id": 0}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 12}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    parts: dict[str, Any] = {"text_encoder": Qwen2_5_VLForConditionalGeneration(config)}
    parts |= {"tokenizer": Qwen2Tokenizer(vocab, []), "vae": vae("AutoencoderKLQwenImage")}
    QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), transformer=transformer, **parts).save_pretrained(folder)


def _vocabulary(special: list[str], end: str = "") -> dict[str, int]:
    """Letters and special tokens, by number: no two letters make a token."""
    tokens = dict.fromkeys([*special, *LETTERS, *(letter + end for letter in LETTERS)])
    return {token: number for number, token in enumerate(tokens)}
