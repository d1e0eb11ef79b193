"""Pages need no MindSpore. One browser serves all tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.browser import Page, browser, find_browser


@pytest.fixture(autouse=True)
def in_graph_mode():
    """These tests run no graph."""


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """A page of headless Chromium."""
    if find_browser() is None:
        pytest.skip("there is no Chromium (apt-get install chromium-headless-shell); .ci/run installs it")
    with browser() as opened:
        yield opened
