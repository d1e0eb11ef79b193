"""The settings that say where the numbers of a run go."""

from __future__ import annotations

from dataclasses import dataclass

from ldm.settings.declare import setting

TRACKERS = ("csv", "html", "tensorboard")


@dataclass
class ReportSettings:
    """Where the numbers of a run go besides log.txt."""

    report_to: list[str] = setting(
        ["csv", "html"],
        "where the numbers of the run go: csv is metrics.csv, which is always written; html is report.html, one page "
        "with curves, samples and settings; tensorboard writes event files (pip install tensorboardX)",
        group="watching",
        choices=TRACKERS,
        aliases=("log_with",),
        length=(0, len(TRACKERS)),
    )
