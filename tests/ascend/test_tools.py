"""What the dry run's tools read, and what they say where they cannot run."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import mindspore as ms
import pytest

from ldm.errors import UserError
from ldm.generation.pipeline import Pipeline
from ldm.runtime.device import GRAPH, Runtime
from ldm.settings.train import TrainSettings
from tests.ascend.runs import MICRO
from tools.ascend import dry_run, simulation, stub_cann
from tools.ascend.dry_run import RECIPE, DoesNotCompile, check_compiled, report, training_flags
from tools.ascend.graphs import Graphs
from tools.ascend.simulation import Simulated, _read, simulate

pytestmark = pytest.mark.without_dry_run

LOG = """\
[INFO] DEVICE(7,7f,python):2026-01-01 [a.cc:177] GenerateKernelMod] kernel opname:ZerosLike, kernel type:acl_kernel
@dry run: {}
[INFO] DEVICE(7,7f,python):2026-01-01 [a.cc:177] GenerateKernelMod] kernel opname:Cast, kernel type:opapi_kernel
[INFO] DEVICE(7,7f,python):2026-01-01 [a.cc:177] GenerateKernelMod] kernel opname:Cast, kernel type:opapi_kernel
[INFO] DEVICE(7,7f,python):2026-01-01 [a.cc:177] GenerateKernelMod] kernel opname:Conv2D, kernel type:acl_kernel
[INFO] DEVICE(7,7f,python):2026-01-01 [a.cc:12] Other] something else
[INFO] PIPELINE(7,7f,python):2026-01-01 [b.cc:3] Run] Use the compilation cache and execute the backend actions only.
a line of the program
@dry run: {"name": "unet", "peak_bytes": 1500000000, "seconds": 2.0}
"""


@pytest.fixture
def done():
    result = Simulated(0, Counter())
    _read(LOG.splitlines(keepends=True), result)
    return result


def test_kernels_are_counted_by_graph(done):
    (graph,) = done.graphs
    assert graph.table() == {"kernels": {"aclnn": {"Cast": 2}, "aclop": {"Conv2D": 1}}, "peak_bytes": 1500000000}
    assert done.kernels["ZerosLike", "aclop"] == 1 and done.graphs_from_cache == 1
    assert list(done.lines) == ["a line of the program"]


def test_the_report_begins_with_the_most_frequent_kernel_and_ends_with_totals(done):
    text = report(done.graphs[0])
    assert "| --- | --- | --- |\n| Cast | aclnn | 2 |\n| Conv2D | aclop | 1 |\n" in text
    assert "2 aclnn, 1 aclop; peak memory 1.500 GB" in text


def test_a_graph_that_is_missing_or_a_process_that_fails_is_an_error(done):
    check_compiled(done, ["unet"])
    with pytest.raises(DoesNotCompile, match="step(?s:.*)a line of the program"):
        check_compiled(done, ["unet", "step"])
    done.exit_code = 1
    with pytest.raises(DoesNotCompile):
        check_compiled(done, ["unet"])


def test_paths_are_absolute_for_the_process_that_runs_elsewhere():
    flags = training_flags(["--model_config", "tests/tiny.yaml"])
    assert f"--model_config={stub_cann.ROOT / 'tests' / 'tiny.yaml'}" in flags


def test_a_recipe_that_is_given_takes_the_place_of_the_lora_recipe():
    given = RECIPE.with_name("train_config_vanilla_v1.yaml")
    for argv, recipe in (([], RECIPE), (["--train_config", str(given)], given)):
        assert f"--train_config={recipe}" == [flag for flag in training_flags(argv) if "train_config" in flag][-1]


def test_the_command_compiles_what_it_is_told_and_writes_the_counts(monkeypatch, done, tmp_path, capsys):
    started = []
    monkeypatch.setattr(dry_run, "simulate", lambda *arguments: started.append(arguments) or done)
    counts = tmp_path / "counts.json"
    own = ["--graphs", "unet", "--soc", "Ascend910A", "--processes", "8", "--output", str(counts)]
    dry_run.main([*own, "--train_batch_size", "4"])
    ((command, soc, process_count),) = started
    assert command[:3] == ["-m", "tools.ascend.graphs", "unet"] and (soc, process_count) == ("Ascend910A", 8)
    assert "--device_target=Ascend" in command and command[command.index("--train_batch_size") + 1] == "4"
    assert json.loads(counts.read_text()) == {"unet": done.graphs[0].table()}
    assert report(done.graphs[0]) in capsys.readouterr().out


@pytest.mark.parametrize("process_count, expected", [(1, [None, None]), (8, ["8", "0"])])
def test_the_program_runs_in_a_folder_of_its_own_as_the_first_process(monkeypatch, process_count, expected):
    for name in ("RANK_SIZE", "RANK_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(simulation, "stub_environment", lambda soc: {"SOC": soc})
    names = "SOC", "RANK_SIZE", "RANK_ID"
    code = f"import json, os; print(json.dumps([os.getcwd(), *map(os.environ.get, {names})])); raise SystemExit(3)"
    result = simulate(["-c", code], "Ascend910A", process_count)
    folder, *found = json.loads(result.text)
    assert result.exit_code == 3 and found == ["Ascend910A", *expected]
    assert not Path(folder).exists()


def test_the_libraries_report_the_device_that_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(stub_cann, "why_not_here", lambda: None)
    monkeypatch.setattr(stub_cann, "make_stub", lambda: tmp_path)
    variables = stub_cann.stub_environment("Ascend910A")
    assert variables[stub_cann.SOC] == "Ascend910A" and variables["MS_SIMULATION_LEVEL"] == "1"
    assert variables["LD_LIBRARY_PATH"] == str(tmp_path / stub_cann.LIB64)


@pytest.mark.parametrize(
    "name, value, reason",
    [
        ("shutil.which", lambda program: None, "gcc"),
        ("importlib.metadata.version", lambda package: "2.10.0", "2.8.0 only"),
        ("platform.machine", lambda: "aarch64", "x86-64"),
    ],
)
def test_where_it_is_not_possible_the_reason_is_named(monkeypatch, name, value, reason):
    monkeypatch.setattr(f"tools.ascend.stub_cann.{name}", value)
    assert reason in stub_cann.why_not_here()
    with pytest.raises(UserError, match=reason):
        stub_cann.stub_environment()


@pytest.mark.skipif(sys.platform != "linux", reason="the libraries are for Linux")
def test_a_c_function_of_the_stub_does_nothing():
    assert stub_cann._empty_function("aclnnAdd") == "long aclnnAdd(void) { return 0; }\n"
    assert "return 1" in stub_cann._empty_function("_ZN2ge15OperatorFactory9IsExistOpERKSs")


def test_the_sampling_networks_hold_the_weights_that_a_pipeline_holds(micro_base_model):
    settings = TrainSettings(model_config=str(MICRO), image_size=16)
    graphs = Graphs(settings, Runtime("CPU", ms.float16, 0, 1, GRAPH))
    pipe = Pipeline.from_checkpoint(micro_base_model, config=MICRO, dtype=ms.float16, device="CPU")
    recorded, run = (
        {p.name: p.dtype for p in model.get_parameters()} for model in (graphs._sampling_model(), pipe.model)
    )
    assert recorded == run and {ms.float16, ms.float32} == set(run.values())
