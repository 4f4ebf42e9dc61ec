"""Causal language models of transformers (the extra `llava`, imported where it is used) as parts of networks."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.conversation import END, SYSTEM


class LanguageModel(nn.Module, ABC):
    """A causal language model that reads embedded tokens, with its tokenizer.

    Args:
        net: Of transformers.
        tokenizer: A fast one of transformers.

    Attributes:
        dim: Of the tokens.

    Raises:
        UserError: a tokenizer that does not tell where tokens lie in a text.
    """

    def __init__(self, net: nn.Module, tokenizer: Any):
        super().__init__()
        if not tokenizer.is_fast:
            name = type(tokenizer).__name__
            raise UserError(f"model.net.language: found {name}, expected a fast tokenizer, which tells tokens' places")
        self.net, self.tokenizer = net, tokenizer
        self.dim: int = net.config.hidden_size

    @property
    def checkpoint_blocks(self) -> tuple[type[nn.Module], ...]:
        """The class of the blocks."""
        return (type(self.net.base_model.layers[0]),)

    @abstractmethod
    def load(self) -> None:
        """Loads pretrained weights."""

    def embed(self, ids: Tensor) -> Tensor:
        """Tokens `(n,)` as vectors `(n, dim)`."""
        return self.net.get_input_embeddings()(ids)

    def forward(self, embedded: Tensor, mask: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Logits of the next tokens, `(n, V)` of the n `wanted` places, bool `(B, T)`, row by row; None is all of them.

        Args:
            embedded: `(B, T, dim)`.
            mask: bool `(B, T)`, false at the end of short rows.
            wanted: Places.
        """
        states = self.net.base_model(inputs_embeds=embedded, attention_mask=mask.long(), use_cache=False)[0]
        return self.net.get_output_embeddings()(states if wanted is None else states[wanted])

    def generate(self, embedded: Tensor, mask: Tensor, most: int, end: str = "") -> list[str]:
        """The likeliest next token, one after the other, until the text ends.

        Args:
            embedded: `(B, T, dim)`.
            mask: bool `(B, T)`, false at the beginning of short rows.
            most: Number of tokens at which a text ends at last.
            end: A sign that ends it, too.
        """
        ends = [self.tokenizer.eos_token_id]
        if end:
            ends.append(self.tokenizer(end, add_special_tokens=False)["input_ids"][-1])
        options = {"do_sample": False, "temperature": None, "top_p": None, "max_new_tokens": most}
        ids = self.net.generate(
            inputs_embeds=embedded, attention_mask=mask.long(), eos_token_id=ends, pad_token_id=ends[0], **options
        )
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]


class PretrainedLanguage(LanguageModel):
    """A model of the hub or of a folder, such as Vicuna (arXiv 2306.05685).

    Args:
        path: Hub name or folder with `config.json`, tokenizer and weights.

    Raises:
        UserError: transformers is absent, or no such model is at `path`.
    """

    def __init__(self, path: str = "lmsys/vicuna-7b-v1.5"):
        self.path = path
        config, tokenizer = (_read(path, kind) for kind in ("AutoConfig", "AutoTokenizer"))
        net = _transformers("AutoModelForCausalLM").from_config(config)
        super().__init__(net, tokenizer)

    def load(self) -> None:
        """Loads the pretrained weights.

        Raises:
            UserError: they cannot be read.
        """
        self.net.load_state_dict(_read(self.path, "AutoModelForCausalLM").state_dict())


class WordLlama(LanguageModel):
    """A small Llama (arXiv 2302.13971) of random weights that knows a few words, needs no files.

    Args:
        words: Those it knows beside the template's, separated by spaces; signs are words of their own.
        dim: Of the tokens.
        depth: Number of blocks.
        heads: Of attention, divides `dim`.
        hidden: Width inside the feed-forward layers.

    Raises:
        UserError: transformers is absent, or heads that do not divide the tokens.
    """

    def __init__(self, words: str, dim: int = 128, depth: int = 3, heads: int = 4, hidden: int = 256):
        if dim % heads:
            raise UserError(f"model.net.language.heads: found {heads}, expected a divisor of dim {dim}")
        tokenizer = word_tokenizer([SYSTEM, "USER: ASSISTANT:", words])
        config = _transformers("LlamaConfig")(
            vocab_size=len(tokenizer),
            hidden_size=dim,
            intermediate_size=hidden,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            initializer_range=dim**-0.5,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        super().__init__(_transformers("LlamaForCausalLM")(config), tokenizer)

    def load(self) -> None:
        """Nothing: its weights are random."""


def word_tokenizer(texts: Sequence[str]) -> Any:
    """A fast tokenizer whose vocabulary are the words, signs and ends of lines of some texts; it knows no others.

    Raises:
        UserError: transformers is absent.
    """
    kind = _transformers("PreTrainedTokenizerFast")
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    split = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]|\n"), "removed", invert=True)
    words = dict.fromkeys(word for text in texts for word, _ in split.pre_tokenize_str(text))
    vocabulary = {word: number for number, word in enumerate(["<s>", END, "\n", *words])}
    whole = Tokenizer(models.WordLevel(vocabulary, unk_token=None))
    whole.pre_tokenizer = split
    return kind(tokenizer_object=whole, bos_token="<s>", eos_token=END)


def _transformers(name: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "model.net.language needs transformers, which is not installed: pip install 'penstock[llava]'"
        ) from error
    return getattr(transformers, name)


def _read(path: str, kind: str) -> Any:
    """What a class of transformers reads from a folder or the hub."""
    reader, folder = _transformers(kind), Path(path).expanduser()
    local = folder.is_dir()
    if not local and (path.count("/") != 1 or path.startswith((".", "/", "~"))):
        raise UserError(f"model.net.language.path: no folder {path}; expected one or a hub name like owner/model")
    try:
        return reader.from_pretrained(str(folder) if local else path)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
        where = "cannot be read" if local else "is no local folder and cannot be fetched from the hub"
        raise UserError(
            f"model.net.language.path: {path} {where} ({reason}); expected config.json, weights and tokenizer there"
        ) from error
