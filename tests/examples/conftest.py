"""What the lessons share."""

from __future__ import annotations

import pytest

from tests.examples.lessons import write_small


@pytest.fixture(scope="package")
def small(tmp_path_factory):
    """A small base model, recipe and data folder."""
    return write_small(tmp_path_factory.mktemp("small"))
