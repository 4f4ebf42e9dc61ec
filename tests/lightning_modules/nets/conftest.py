"""Recorded numbers, of which no one may be left out."""

import pytest
from golden_files import Record


@pytest.fixture
def record():
    """Opens a file of recorded numbers; a test that leaves a result uncompared fails."""
    opened: list[Record] = []

    def open_(*args, **options):
        opened.append(Record(*args, **options))
        return opened[-1]

    yield open_
    for one in opened:
        assert not one.left, sorted(one.left)
