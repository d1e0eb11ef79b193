"""The level that MindSpore's Ascend back end compiles with is the one that the log states."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tools.ascend.stub_cann import stub_environment

# At O2, CANN's graph engine, of which the dry run has nothing, ends the process: the level is logged before that.
PROGRAM = """
import logging, mindspore as ms
from ldm.runtime.device import setup_runtime
logging.disable()
print("stated", setup_runtime("Ascend").jit_level, flush=True)

class Relu(ms.nn.Cell):
    def construct(self, x):
        return ms.ops.relu(x)

Relu()(ms.Tensor([1.0]))
"""
TABLE = {"RANK_TABLE_FILE": "table.json", "DEVICE_ID": "0"}


@pytest.mark.parametrize(
    ("soc", "variables", "level"),
    [
        ("Ascend910A", {}, "O0"),
        ("Ascend910B3", {}, "O0"),
        ("Ascend910B3", TABLE, "O2"),
        ("Ascend910B3", {**TABLE, "MS_ROLE": "MS_WORKER"}, "O0"),
    ],
    ids=["first 910", "A2", "rank table", "rank table under msrun"],
)
def test_without_a_jit_level_it_is_o0_unless_a_rank_table_starts_the_process(soc, variables, level, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in (*TABLE, "RANK_ID", "MS_ROLE")}
    environment.update(stub_environment(soc), PYTHONPATH=str(ROOT), GLOG_v="1", **variables)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, timeout=300,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    assert re.findall(r"^stated (\w+)", done.stdout, re.M) == [level], done.stdout[-2000:]
    assert re.findall(r"The jit_level is: (\w+)", done.stdout)[-1:] == [level]
