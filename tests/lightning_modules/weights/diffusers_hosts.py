"""The transformers of diffusers that TwinFlow starts from, with random weights and of no size: 4x8x8 latents."""

import torch

TEXT, POOLED = 12, 20
HOSTS = {
    "StableDiffusion3": (
        "SD3Transformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": TEXT,
            "caption_projection_dim": 16,
            "pooled_projection_dim": POOLED,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
    ),
    "Sana": (
        "SanaTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": TEXT,
            "sample_size": 8,
        },
    ),
    "QwenImage": (
        "QwenImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": TEXT,
            "axes_dims_rope": (4, 6, 6),
        },
    ),
    "ZImage": (
        "ZImageTransformer2DModel",
        {
            "in_channels": 4,
            "dim": 48,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": TEXT,
            "axes_dims": [8, 8, 8],
            "axes_lens": [64, 16, 16],
        },
    ),
}


def transformer(host: str, seed: int = 0) -> torch.nn.Module:
    """The transformer of a host of `nets.any_step_hosts`."""
    import diffusers

    kind, config = HOSTS[host]
    torch.manual_seed(seed)
    return getattr(diffusers, kind)(**config)


def features(host: str, rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens `(rows, 4, TEXT)`, and pooled features `(rows, POOLED)` or the mask `(rows, 4)` of 1 to 4 of them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(rows, 4, TEXT, generator=generator)
    if host == "StableDiffusion3":
        return tokens, torch.randn(rows, POOLED, generator=generator)
    return tokens, (torch.arange(4) <= torch.arange(rows)[:, None] % 4).long()
