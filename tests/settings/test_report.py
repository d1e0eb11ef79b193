"""Where the numbers of a run go."""

from __future__ import annotations

import pytest

from ldm.errors import UserError
from ldm.settings.read import read_settings
from ldm.settings.report import ReportSettings


def test_csv_and_html_are_on_by_default():
    assert ReportSettings().report_to == ["csv", "html"]


@pytest.mark.parametrize("flag", ["--report_to", "--log_with"])
def test_report_to_is_a_list_also_under_kohyas_name(flag):
    assert read_settings(ReportSettings, [flag, "html", "tensorboard"]).report_to == ["html", "tensorboard"]
    assert read_settings(ReportSettings, [flag, "csv"]).report_to == ["csv"]


def test_an_unknown_tracker_is_refused_with_those_that_there_are():
    with pytest.raises(UserError, match='"wandb" is not allowed: one of "csv", "html", "tensorboard"'):
        read_settings(ReportSettings, ["--report_to", "wandb"])
