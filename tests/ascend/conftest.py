"""The dry run on Ascend's back end. It takes minutes, so pytest collects it only if tests/ascend is named."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.ascend.runs import RUNS, Result
from tools.ascend.stub_cann import make_stub, why_not_here

HERE = Path(__file__).parent


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    named = [Path(argument.partition("::")[0]).resolve() for argument in config.args]
    return None if any(path == HERE or HERE in path.parents for path in named) else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_not_here()
    for item in items:
        if reason is not None and HERE in item.path.parents and "without_dry_run" not in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def runs(request, tmp_path_factory, micro_base_model, micro_data):
    """Run name -> its result. All runs that the selected tests need start at once, as many as there are cores."""
    make_stub()
    folder = tmp_path_factory.mktemp("ascend")
    needed = {name for item in request.session.items for mark in item.iter_markers("runs") for name in mark.args}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        futures: dict[str, Future[Result]] = {
            name: pool.submit(run, folder, micro_base_model, micro_data) for name, run in RUNS.items() if name in needed
        }
        yield {name: future.result for name, future in futures.items()}
        for future in futures.values():
            future.cancel()
