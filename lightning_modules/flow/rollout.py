"""Long clips in pieces: windows that begin with known frames, and overlapping chunks (arXiv 2511.20462)."""


def windows(total: int, window: int, context: int) -> list[tuple[int, int, int]]:
    """(first frame, how many of the next are known, end) of windows that make `total` frames one after the other.

    Args:
        total: Frames of the clip.
        window: The most frames of a window.
        context: Frames that a window but the first begins with, made by the one before; less than `window`.

    Raises:
        ValueError: a number out of range.
    """
    if min(total, context) < 1 or context >= window:
        raise ValueError(
            f"windows of {window} frames, {context} known, for {total}: expected at least 1 known and 1 new in a window"
        )
    found = [(0, 0, min(window, total))]
    while found[-1][2] < total:
        start = found[-1][2] - context
        found.append((start, context, min(start + window, total)))
    return found


def chunks(total: int, chunk: int, behind: int, ahead: int) -> list[tuple[int, int, int, int]]:
    """(start, first kept, end of kept, end) of chunks in which every kept frame has its neighbours.

    Args:
        total: Frames of the clip.
        chunk: The most frames of a chunk.
        behind: Frames before a kept one that have to be in the chunk, or all that there are.
        ahead: The same after it.

    Raises:
        ValueError: chunks in which no frame can be kept.
    """
    if min(total, chunk) < 1 or (total > chunk and chunk <= behind + ahead):
        raise ValueError(f"chunks of {chunk} frames, expected more than {behind} before and {ahead} after a kept one")
    found, kept = [], 0
    while kept < total:
        start = max(0, kept - behind)
        end = min(start + chunk, total)
        last = total if end == total else end - ahead
        found.append((start, kept, last, end))
        kept = last
    return found
