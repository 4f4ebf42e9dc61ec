"""The one exception that reaches a user as a single line and exit code 2."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """Bad input: the message is one line naming the file or key, what was found, what was expected.

    Args:
        message: The line.
        everywhere: Every rank of a run raises the same: the command line prints it on the first only.
    """

    def __init__(self, message: str, everywhere: bool = False):
        super().__init__(" ".join(message.split()))
        self.everywhere = everywhere


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the nearest of `choices`, or an empty string when none is near."""
    near = get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else ""
