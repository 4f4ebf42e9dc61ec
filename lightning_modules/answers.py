"""How answers to questions about images are scored: as VQA, TextVQA and MMBench do."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

ARTICLES = ("a", "an", "the")
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {name: str(number) for number, name in enumerate(NAMES)}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
APOSTROPHES = re.findall(
    r"\S+",
    """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't should've shouldn't shouldn't've she'd've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
    """,
)


def _without_one(word: str) -> list[str]:
    places = [k for k, sign in enumerate(word) if sign == "'"]
    return [word[:k] + word[k + 1 :] for k in places]


CONTRACTIONS = {short: word for word in APOSTROPHES for short in _without_one(word)}
CONTRACTIONS |= {"somebody'd": "somebodyd"}


def plain(answer: str) -> str:
    """An answer as the VQA evaluation compares it (arXiv 1505.00468): small letters, no articles or punctuation,
    numbers below eleven as digits, apostrophes where they belong.

    As there, a sign is dropped where a space is beside one of its kind or a comma between digits stands anywhere, and
    else makes a space; points go unless a digit follows.
    """
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = found = text.replace("\n", " ").replace("\t", " ").strip()
    for sign in PUNCTUATION:
        beside = f"{sign} " in text or f" {sign}" in text or re.search(r"(?<=\d),+(?=\d)", text)
        found = found.replace(sign, "" if beside else " ")
    found = re.sub(r"\.(?!\d)", "", found)
    words = [NUMBERS.get(word, word) for word in found.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """min(n / 3, 1) of n people who gave the answer, the mean over all choices of the others (arXiv 1505.00468 eq. 1).

    Args:
        answer: Of a model.
        references: Of the people, ten in TextVQA (arXiv 1904.08920).
    """
    own, given = plain(answer), [plain(reference) for reference in references]
    agreed = sum(other == own for other in given)
    if not agreed:
        return 0.0
    shares = [min((agreed - (other == own)) / 3, 1.0) for other in given]
    return sum(shares) / len(shares)


def exact(answer: str, references: Sequence[str]) -> float:
    """1 where an answer is one of the references but for letters' size, spaces and a last point."""
    return float(_bare(answer) in map(_bare, references))


def option(answer: str, references: Sequence[str]) -> float:
    """1 where the letter of an option, alone or with a sign behind it such as in `B. a cat`, is the reference."""
    found = re.match(r"\W*([A-Z])(?:\W*$|[.:),])", answer.strip())
    return float(found is not None and found[1] in references)


def _bare(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


RULES: dict[str, Callable[[str, Sequence[str]], float]] = {"exact": exact, "vqa": vqa_accuracy, "option": option}


class Scored(NamedTuple):
    """Of an answer: the number of its sample, that of the question, and what it is worth, in [0, 1]."""

    index: int
    group: int
    score: float


def accuracies(scored: Iterable[Scored]) -> dict[str, float]:
    """`accuracy`, the mean over questions; one that is asked several ways is worth its worst answer (arXiv 2307.06281,
    circular evaluation), and `accuracy_once`, where there are such, is of the first way alone.
    """
    groups = defaultdict(list)
    for _, group, score in sorted(set(scored)):
        groups[group].append(score)
    found = {"accuracy": sum(map(min, groups.values())) / len(groups)}
    if any(len(scores) > 1 for scores in groups.values()):
        found["accuracy_once"] = sum(scores[0] for scores in groups.values()) / len(groups)
    return found
