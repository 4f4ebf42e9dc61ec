"""The encoder of T5 (arXiv 1910.10683) as STARFlow and STARFlow-V read prompts (arXiv 2506.06276, 2511.20462).

transformers (the extra `text2image`) is imported where it is used.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from penstock.lightning_modules.nets.text_encoder import TextEncoder, to_device
from penstock.lightning_modules.weights import folders


class T5Text(TextEncoder):
    """Last states of T5's encoder times the attention mask: places after a prompt are 0, and attended to all the same.

    Prompts that are longer than `length` are cut. The features of the last prompts are kept, so that the empty one and
    those of sample pictures are encoded once.

    Args:
        path: Folder or hub name of the model and its tokenizer, such as google/flan-t5-xl (features of 2048 numbers).
        length: Tokens L: 256 for STARFlow-V, 128 for STARFlow.
        dtype: Of the encoder's weights; features are float32.
        keep: Prompts whose features are kept.
        tokenizer: Folder in `path` of the tokenizer, where it does not lie with the model.
        encoder: Folder in `path` of the model.

    Raises:
        UserError: transformers is absent, or no such model is at `path`.
    """

    def __init__(
        self,
        path: str = "google/flan-t5-xl",
        length: int = 256,
        dtype: Literal["float32", "bfloat16"] = "bfloat16",
        keep: int = 64,
        tokenizer: str = "",
        encoder: str = "",
    ):
        self._tokenizer = folders.part(path, tokenizer, "transformers", "AutoTokenizer")
        net = folders.part(path, encoder, "transformers", "T5EncoderModel")
        self._net = net.to(getattr(torch, dtype)).eval().requires_grad_(False)
        self.dim, self.length, self.keep = self._net.config.d_model, length, keep
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, texts: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
        """`(B, length, dim)` float32."""
        new = [text for text in dict.fromkeys(texts) if text not in self._kept]
        found = dict(zip(new, self._features(new, torch.device(device)))) if new else {}
        rows = [found[text] if text in found else self._kept[text].to(device) for text in texts]
        for text in dict.fromkeys(texts):
            self._kept[text] = self._kept.pop(text) if text in self._kept else found[text].clone()
        while len(self._kept) > self.keep:
            self._kept.popitem(last=False)
        return torch.stack(rows).float()

    @torch.no_grad()
    def _features(self, texts: list[str], device: torch.device) -> Tensor:
        if next(self._net.parameters()).device != device:
            self._net.to(device)
        options = {"padding": "max_length", "truncation": True, "max_length": self.length, "return_tensors": "pt"}
        tokens = {key: to_device(value, device) for key, value in self._tokenizer(texts, **options).items()}
        with torch.autocast(device.type, enabled=False):
            states = self._net(tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        return states * tokens["attention_mask"][..., None].to(states)
