"""Conversations about an image as text and as tokens, laid out as LLaVA-1.5 does (arXiv 2310.03744)."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from penstock.lightning_modules.errors import UserError

IMAGE = "<image>"
IMAGE_ID = -200
"""Stands in a prompt where an image's tokens come."""
IGNORED = -100
"""The label of what is not learnt."""
END = "</s>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
Template = Literal["vicuna_v1", "plain"]


class Prompt(NamedTuple):
    """Tokens of a conversation, int64 `(n,)`: `ids` with `IMAGE_ID`, and `labels`, those of answers or `IGNORED`."""

    ids: Tensor
    labels: Tensor


class Written(NamedTuple):
    """A conversation as one text, and where answers begin and end in it, with the space before and the mark behind."""

    text: str
    answers: list[tuple[int, int]]


def with_image(question: str) -> str:
    """A question with the image before it, wherever it was."""
    return f"{IMAGE}\n{question.replace(IMAGE, '').strip()}".strip()


def written(turns: Sequence[str], template: Template = "vicuna_v1") -> Written:
    """Questions and answers in turn, a question first, as one text.

    Args:
        turns: An odd number of them ends with a question that is to be answered.
        template: `vicuna_v1` has a system message and roles; `plain`, of captions, is image and answer alone.
    """
    text, spans = (f"{SYSTEM} ", []) if template == "vicuna_v1" else ("", [])
    for number, turn in enumerate(turns):
        if template == "plain":
            text, start = text + (turn if number % 2 else IMAGE), len(text)
            text += "\n" if number % 2 else ""
        elif number % 2:
            text, start = f"{text} {turn}{END}", len(text)
        else:
            text += f"USER: {turn} ASSISTANT:"
        if number % 2:
            spans.append((start, len(text)))
    return Written(text, spans)


def tokenized(conversation: Written, tokenizer: Any) -> Prompt:
    """A conversation as tokens, what lies between images by itself, behind the token that begins a text, if any.

    Args:
        conversation: Text and answers.
        tokenizer: A fast one of transformers.

    Raises:
        UserError: more than one image, or words that the tokenizer does not know and has no token for.
    """
    first = tokenizer.bos_token_id
    ids, labels, place = ([], [], 0) if first is None else ([first], [IGNORED], 0)
    pieces = conversation.text.split(IMAGE)
    if len(pieces) > 2:
        raise UserError(f"conversation '{pieces[1].strip()[:40]}': found {len(pieces) - 1} images, expected at most 1")
    for number, piece in enumerate(pieces):
        if number:
            ids, labels, place = [*ids, IMAGE_ID], [*labels, IGNORED], place + len(IMAGE)
        found = _encoded(piece, tokenizer)
        for token, (start, stop) in zip(found["input_ids"], found["offset_mapping"]):
            learnt = any(start + place < b and stop + place > a for a, b in conversation.answers)
            ids.append(token)
            labels.append(token if learnt else IGNORED)
        place += len(piece)
    return Prompt(torch.tensor(ids), torch.tensor(labels))


def _encoded(text: str, tokenizer: Any) -> dict[str, Any]:
    if not text:
        return {"input_ids": [], "offset_mapping": []}
    try:
        return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    except Exception as error:  # what tokenizers raises has no class of its own
        known = set(tokenizer.get_vocab())
        words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        unknown = next((word for word, _ in words if word not in known), text[:40])
        raise UserError(f"model.net.language: its vocabulary has no '{unknown}' ({error})") from error
