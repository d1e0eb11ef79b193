"""The generations of Ascend devices, the choice of a device, and the fit of CANN. No device is needed."""

from __future__ import annotations

import json

import mindspore as ms
import pytest

from ldm.errors import UserError
from ldm.runtime import ascend


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """A call sets variables; those of this machine are gone."""
    for name in ("DEVICE_ID", "RANK_ID", "RANK_TABLE_FILE", "MS_ROLE", "ASCEND_HOME_PATH"):
        monkeypatch.delenv(name, raising=False)
    return lambda **names: [monkeypatch.setenv(name, str(value)) for name, value in names.items()]


@pytest.fixture
def rank_table(tmp_path):
    """Two hosts with two processes each, on the devices 4 and 5."""
    servers = [
        {"device": [{"device_id": str(4 + i), "rank_id": str(2 * host + i)} for i in range(2)]} for host in range(2)
    ]
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"version": "1.0", "server_list": servers}))
    return path


@pytest.mark.parametrize(
    ("name", "first", "a2_or_later"),
    [
        ("Ascend910A", True, False),
        ("Ascend910B", True, False),  # not an A2, whose names have a digit after the B
        ("Ascend910ProB", True, False),
        ("Ascend910B1", False, True),
        ("Ascend910B4-1", False, True),
        ("Ascend910_9391", False, True),
        ("Ascend310P3", False, False),
        ("", False, False),
    ],
)
def test_the_name_of_a_device_tells_its_generation(name, first, a2_or_later):
    assert (ascend.is_first_910(name), ascend.is_a2_or_later(name)) == (first, a2_or_later)


def test_a_machine_without_cann_has_no_device_name():
    assert ascend.device_name() == ""


@pytest.mark.parametrize(
    ("name", "mode"),
    [("Ascend910A", "allow_fp32_to_fp16"), ("Ascend910B3", "must_keep_origin_dtype"), ("Ascend310P3", "")],
)
def test_the_precision_mode_follows_the_generation(name, mode, monkeypatch):
    calls = []
    monkeypatch.setattr(ms.device_context.ascend.op_precision, "precision_mode", calls.append)
    assert ascend.set_precision_mode(name) == mode
    assert calls == [mode] * bool(mode)


def test_a_precision_mode_that_the_program_set_before_stays(monkeypatch):
    def precision_mode(mode):
        raise RuntimeError("The 'precision_mode' can not be set repeatedly.")

    monkeypatch.setattr(ms.device_context.ascend.op_precision, "precision_mode", precision_mode)
    assert ascend.set_precision_mode("Ascend910B3") == ""


@pytest.mark.parametrize(("given", "level"), [(None, "O0"), ("O0", "O0"), ("O1", "O1"), ("O2", "O2")])
def test_the_jit_level_is_the_given_one_or_o0(given, level):
    assert ascend.jit_level_in_force(given) == level


def test_a_rank_table_makes_the_jit_level_o2_but_not_under_msrun(environment, rank_table):
    environment(RANK_TABLE_FILE=rank_table)
    assert ascend.jit_level_in_force("O0") == "O2"
    environment(MS_ROLE="MS_WORKER")
    assert ascend.jit_level_in_force("O0") == "O0"


def test_o2_is_warned_of_with_the_way_out(environment, rank_table):
    assert ascend.warning_of_jit_level("O0") == ascend.warning_of_jit_level("O1") == ""
    warning = ascend.warning_of_jit_level("O2")
    assert "never compiled" in warning and "may not compile" in warning and warning.endswith("use --jit_level O0")
    environment(RANK_TABLE_FILE=rank_table)  # which no jit_level changes
    warning = ascend.warning_of_jit_level("O2")
    assert "unset RANK_TABLE_FILE" in warning and "msrun --worker_num" in warning and "--jit_level O0" not in warning


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("text_to_image.py", "text_to_image.py --use_parallel True"),
        ("tools/eval/eval_fid.py", "tools/eval/eval_fid.py --use_parallel True"),
        ("a folder/train.py", "'a folder/train.py' --use_parallel True"),
        ("", "train_text_to_image.py --use_parallel True"),
    ],
)
def test_the_command_of_msrun_names_the_running_script(script, words, monkeypatch):
    monkeypatch.setattr("sys.argv", [script, "--prompt", "x"])
    assert ascend.msrun_command().startswith("msrun --worker_num=8 ") and f" {words}" in ascend.msrun_command()


@pytest.mark.parametrize(("cores", "calls"), [(1, [6]), (2, [6]), (5, [6]), (6, []), (192, [])])
def test_few_cores_get_more_threads(cores, calls, monkeypatch):
    given = []
    monkeypatch.setattr(ascend.os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setattr(ascend.ms.runtime, "dispatch_threads_num", given.append)
    ascend.give_enough_threads()
    assert given == calls


def test_the_number_of_threads_may_have_been_set_before(monkeypatch):
    def dispatch_threads_num(number):
        raise RuntimeError("The 'dispatch_threads_num' can not be set repeatedly.")

    monkeypatch.setattr(ascend.os, "sched_getaffinity", lambda process: {0})
    monkeypatch.setattr(ascend.ms.runtime, "dispatch_threads_num", dispatch_threads_num)
    ascend.give_enough_threads()


@pytest.mark.parametrize(
    ("name", "variable", "mode"),
    [
        ("Ascend910B3", "INFNAN_MODE", "INFNAN"),
        ("Ascend910B3", "SATURATION_MODE", "saturation"),
        ("Ascend910A", "INFNAN_MODE", "saturation"),
    ],
)
def test_the_first_910_saturates_in_any_mode(name, variable, mode, environment):
    environment(MS_ASCEND_CHECK_OVERFLOW_MODE=variable)
    assert ascend.overflow_mode(name) == mode


def test_without_variables_mindspore_chooses_the_device():
    assert ascend.device_id() is None


def test_device_id_names_the_device(environment):
    environment(DEVICE_ID=3)
    assert ascend.device_id() == 3


def test_under_msrun_each_process_has_its_device_already(environment, rank_table):
    environment(MS_ROLE="MS_WORKER", DEVICE_ID=3, RANK_ID=0, RANK_TABLE_FILE=rank_table)
    assert ascend.device_id() is None


@pytest.mark.parametrize(("process", "device"), [(0, 4), (1, 5), (2, 4), (3, 5)])
def test_a_rank_table_gives_each_process_its_own_device(process, device, environment, rank_table):
    environment(RANK_TABLE_FILE=rank_table, RANK_ID=process)
    assert ascend.device_id() == device
    environment(DEVICE_ID=device)
    assert ascend.device_id() == device


def test_a_rank_table_alone_does_not_tell_the_processes_apart(environment, rank_table):
    environment(RANK_TABLE_FILE=rank_table)
    with pytest.raises(UserError, match="RANK_TABLE_FILE is set without RANK_ID.*same device.*msrun"):
        ascend.device_id()
    environment(DEVICE_ID=5)
    assert ascend.device_id() == 5


def test_a_device_id_that_contradicts_the_rank_table_is_refused(environment, rank_table):
    environment(RANK_TABLE_FILE=rank_table, RANK_ID=1, DEVICE_ID=4)
    with pytest.raises(UserError, match="DEVICE_ID is 4, but .*table.json gives process 1 .*device 5"):
        ascend.device_id()


@pytest.mark.parametrize("text", ["[]", '{"server_list": [{"device": [{"rank_id": "1"}]}]}', '{"group_list": []}'])
def test_a_rank_table_without_the_process_is_refused(text, environment, tmp_path):
    (tmp_path / "table.json").write_text(text)
    environment(RANK_TABLE_FILE=tmp_path / "table.json", RANK_ID=1)
    with pytest.raises(UserError, match="does not name the device of process 1 .*msrun"):
        ascend.device_id()


@pytest.mark.parametrize("number", ["x", "-1", "1.0", "²"])
def test_a_device_id_that_is_no_number_is_named(number, environment):
    environment(DEVICE_ID=number)
    with pytest.raises(UserError, match=f'DEVICE_ID is "{number}", not the number'):
        ascend.device_id()


def test_the_version_of_cann_is_read_where_mindspore_reads_it(environment, tmp_path):
    assert ascend.cann_version() == ""
    environment(ASCEND_HOME_PATH=tmp_path)
    assert ascend.cann_version() == ""
    (tmp_path / "compiler").mkdir()
    (tmp_path / "compiler" / "version.info").write_text("Name=x\nVersion=8.5.0.1.2\n")
    assert ascend.cann_version() == "8.5"


def test_the_accepted_versions_of_cann_are_those_of_the_wheel():
    accepted = ascend.accepted_cann_versions()
    assert accepted and all(len(version.split(".")) == 2 for version in accepted)


def test_a_cann_that_does_not_fit_is_reported():
    assert ascend.cann_fault("8.5", ("8.3", "8.5")) == ascend.cann_fault("", ("8.5",)) == ""
    assert ascend.cann_fault("8.5", ()) == ""
    fault = ascend.cann_fault("7.7", ("8.3", "8.5"))
    assert "CANN 7.7 does not fit MindSpore" in fault and "8.3, 8.5" in fault and "install a pair" in fault
