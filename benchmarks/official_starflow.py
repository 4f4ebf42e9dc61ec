"""The released STARFlow from a checkout of apple/ml-starflow, with the weights of one of our networks."""

import importlib
import sys
import tempfile
from pathlib import Path

import torch.distributed as dist
from torch import nn

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.starflow import STARFlow
from penstock.lightning_modules.weights.starflow import UNREAD, invert


def released(folder: Path, net: STARFlow, text: int) -> nn.Module:
    """The released network with the sizes and the weights of `net`, in its precision and on its device.

    Its Jacobi iteration reduces over ranks whether there are any: a group of one is made where there is none.

    Args:
        folder: The checkout; it needs einops and tqdm.
        net: Blocks with plain layers and a text, its side a whole number.
        text: Text tokens.

    Raises:
        UserError: no checkout, or a package that it needs is not there.
    """
    if not (folder / "transformer_flow.py").is_file():
        raise UserError(f"--official {folder}: no transformer_flow.py there, expected a checkout of apple/ml-starflow")
    sys.path.insert(0, str(folder))
    try:
        code = importlib.import_module("transformer_flow")
    except ModuleNotFoundError as error:
        raise UserError(f"--official {folder}: it needs the package {error.name}") from error
    finally:
        sys.path.remove(str(folder))
    shallow, deep = net.blocks[0], net.blocks[-1]
    video, weight = len(net.shape) == 4, deep.proj_in.weight
    with weight.device:
        model = code.Model(
            in_channels=net.shape[-3],
            img_size=int(deep.rotary.side),
            patch_size=net.patch,
            pt_seq_len=int(deep.rotary.side),
            channels=shallow.proj_in.out_features,
            top_block_channels=deep.proj_in.out_features,
            num_blocks=len(net.blocks),
            layers_per_block=[len(block.attn_blocks) for block in net.blocks],
            head_dim=deep.attn_blocks[0].attention.head_dim,
            rope=True,
            sos=True,
            txt_size=text,
            txt_dim=net.text_dim,
            cond_top_only=True,
            use_softplus=True,
            use_final_norm=True,
            soft_clip=deep.soft_clip,
            seq_order=net.order,
            temporal_causal=int(video),
            shallow_block_local=video,
        )
    model = model.to(weight.dtype)
    missing, unexpected = model.load_state_dict(invert(net.state_dict()), strict=False)
    if wrong := [*unexpected, *(key for key in missing if key != "var" and not UNREAD.fullmatch(key))]:
        raise UserError(f"--official {folder}: it has other weights than ours, {', '.join(wrong[:3])}")
    if not dist.is_initialized():
        backend, file = ("nccl" if weight.is_cuda else "gloo"), Path(tempfile.mkdtemp()) / "store"
        dist.init_process_group(backend, init_method=f"file://{file}", rank=0, world_size=1)
    return model
