"""Record what the dry run counts, after a change that is meant to change it.

    python -m tests.ascend.record               # all tables in tests/golden/ascend
    python -m tests.ascend.record plain-O0      # some of them

It prints the totals before and after.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.files.documents import json_text, read_json
from ldm.runtime.script import run_script
from tests.ascend.runs import RECORDED, ROOT, RUNS
from tools.ascend.dry_run import check_compiled
from tools.ascend.stub_cann import make_stub

GOLDEN = ROOT / "tests" / "golden" / "ascend"

Table = Mapping[str, Any]  # {graph: {"kernels": {kind: {operator: count}}, "peak_bytes": bytes}}


def recorded(name: str) -> Table:
    """Return a recorded table."""
    return read_json(GOLDEN / f"{name}.json")


def totals(table: Table) -> str:
    """Return the launches and the memory of each graph in one line."""
    return "; ".join(
        f"{graph}: "
        + ", ".join(f"{sum(counts.values())} {kind}" for kind, counts in values["kernels"].items())
        + f", {values['peak_bytes']:,} bytes"
        for graph, values in table.items()
    )


def record(name: str) -> None:
    done = RUNS[name](Path(), Path(), Path())
    check_compiled(done, RECORDED[name])
    table = {graph.name: graph.table() for graph in done.graphs}
    path = GOLDEN / f"{name}.json"
    before = totals(recorded(name)) if path.exists() else "not recorded"
    path.write_text(json_text(table, indent=1), encoding="utf-8")
    print(f"{name}\n  before: {before}\n  now:    {totals(table)}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    names = (sys.argv[1:] if argv is None else argv) or list(RECORDED)
    for name in names:
        if name not in RECORDED:
            raise UserError(f"there is no table {name}: give some of {', '.join(RECORDED)}")
    GOLDEN.mkdir(parents=True, exist_ok=True)
    make_stub()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(record, names))


if __name__ == "__main__":
    run_script(main)
