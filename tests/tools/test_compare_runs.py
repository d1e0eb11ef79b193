"""tools/compare_runs.py: what it takes, what it writes, what it refuses."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ldm.errors import UserError
from tests.conftest import ROOT
from tests.training.report.runs import write_metrics, write_run
from tools.compare_runs import main


@pytest.fixture
def runs(tmp_path):
    return [str(write_run(tmp_path / name, seed=seed, lora_rank=seed + 1)) for seed, name in enumerate("ab")]


def test_it_writes_one_page_as_a_command_without_mindspore(runs, tmp_path):
    code = "import sys; from tools.compare_runs import main; main(); assert 'mindspore' not in sys.modules"
    output = tmp_path / "pages" / "compare.html"
    done = subprocess.run(
        [sys.executable, "-c", code, *runs, "--output", str(output)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"written to {output}: 2 runs")
    assert "Settings that differ" in output.read_text(encoding="utf-8")


def test_of_one_run_it_writes_the_report(runs, tmp_path):
    main([runs[0], "--output", str(tmp_path / "a.html")])
    assert "<h1>Training of a</h1>" in (tmp_path / "a.html").read_text(encoding="utf-8")


def test_its_own_page_is_replaced_and_another_file_is_not(runs, tmp_path):
    main([*runs, "--output", str(tmp_path / "page.html")])
    main([runs[0], "--output", str(tmp_path / "page.html")])
    main([*runs, "--output", str(tmp_path / "page.html")])
    (tmp_path / "mine.html").write_text("<html>mine</html>")
    with pytest.raises(UserError, match="mine.html exists and is not a page of this tool"):
        main([*runs, "--output", str(tmp_path / "mine.html")])
    assert (tmp_path / "mine.html").read_text() == "<html>mine</html>"


def test_a_folder_that_is_no_run_is_refused(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, error in (
        ("empty", "holds no metrics.csv"),
        ("nowhere", "is not a folder"),
        ("a/run.json", "not a folder"),
    ):
        with pytest.raises(UserError, match=error):
            main([*runs, str(tmp_path / name), "--output", str(tmp_path / "page.html")])
    assert not (tmp_path / "page.html").exists()


def test_runs_of_earlier_versions_with_metrics_alone_are_compared(tmp_path, capsys):
    for name in "ab":
        write_metrics(tmp_path / name)
    main([str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "page.html")])
    assert "2 runs" in capsys.readouterr().out
