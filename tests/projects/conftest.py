"""What the tests of all projects share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.projects.zygote import Zygote


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """The process whose children are the commands of all tests."""
    process = Zygote()
    yield process
    process.close()
