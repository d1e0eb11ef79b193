r"""Compare the runs in several output folders on one page, which needs neither a server nor a network.

    python tools/compare_runs.py output/a output/b
    python tools/compare_runs.py output/a output/b output/c --output compare.html

The page shows the settings that differ first, then results, curves over each other, and sample images side by side. Of
one run, it is the run's report. It reads what training wrote: train_args.yaml, metrics.csv, and where they are there,
validation.csv, samples/ and run.json. A run that is going on may be read too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.runtime.script import run_script, start_script  # noqa: E402

if __name__ == "__main__":
    start_script()

from ldm.errors import UserError, plain  # noqa: E402
from ldm.files.atomic import atomic_path  # noqa: E402
from ldm.files.inputs import is_file, is_folder, open_file  # noqa: E402
from ldm.files.outputs import claim_file  # noqa: E402
from ldm.files.paths import writing  # noqa: E402
from ldm.runtime.logs import set_up_logging  # noqa: E402
from ldm.settings.declare import REQUIRED, setting  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402
from ldm.training.report.comparison import GENERATOR, MOST_RUNS, comparison_page  # noqa: E402
from ldm.training.report.page import report_page  # noqa: E402
from ldm.training.report.records import RunRecord, read_record  # noqa: E402

NEEDED = ("metrics.csv", "train_args.yaml")  # one of them shows that a folder is a run's


@dataclass
class CompareSettings:
    """The settings of this tool."""

    runs: list[str] = setting(
        REQUIRED, "output folders of the runs", positional=True, path=True, length=(1, MOST_RUNS), group="settings"
    )
    output: str = setting("output/compare.html", "the page; an earlier page of this tool is replaced", path=True)


def main(argv: Sequence[str] | None = None) -> None:
    settings = read_settings(CompareSettings, argv, prog="tools/compare_runs.py", description=__doc__)
    set_up_logging("WARNING")
    output = Path(settings.output)
    check_output(output)
    with claim_file(output, "--output"):
        records = [read_run(Path(run)) for run in settings.runs]
        page = report_page(records[0]) if len(records) == 1 else comparison_page(records)
        with writing(output), atomic_path(output) as temporary:
            temporary.write_text(page, encoding="utf-8")
    print(
        f"written to {plain(output)}: {len(records)} run{'s' * (len(records) > 1)}, {len(page.encode()) / 1e6:.2f} MB"
    )


def read_run(folder: Path) -> RunRecord:
    """Read a run. Raises UserError if the folder does not exist or has no run."""
    if not is_folder(folder, "the run"):
        raise UserError(f"the run {plain(folder)} is not a folder: give the output_path of a training")
    if not any(is_file(folder / name) for name in NEEDED):
        raise UserError(
            f"{plain(folder)} holds no {' and no '.join(NEEDED)}, so it is not the output_path of a training"
        )
    return read_record(folder)


def check_output(path: Path) -> None:
    """Raise UserError if there is a file that is not a page of this tool."""
    if not is_file(path, "--output"):
        return
    with open_file(path, "--output") as file:
        beginning = file.read(4096)
    if (
        f'name="generator" content="{GENERATOR}"'.encode() not in beginning
        and b'content="train_text_to' not in beginning
    ):
        raise UserError(f"--output {plain(path)} exists and is not a page of this tool: give another path")


if __name__ == "__main__":
    run_script(main)
