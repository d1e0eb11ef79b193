"""Which precision text_to_image.py and the pipeline compute in, and that the processes of a run agree."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest

from ldm.errors import UserError
from ldm.generation import generate
from ldm.generation.generate import check_same_precision
from ldm.generation.pipeline import Pipeline
from ldm.models.stable_diffusion import build_model
from ldm.runtime import device
from ldm.runtime.device import COMPUTE_DTYPES, current_runtime, setup_runtime
from ldm.settings.generate import GenerateSettings
from ldm.settings.model import load_model_config
from ldm.weights.checkpoint import write_checkpoint
from tests.conftest import ROOT

TINY = ROOT / "tests" / "tiny.yaml"


@pytest.fixture
def base(tmp_path):
    model = build_model(load_model_config(TINY))
    write_checkpoint(tmp_path / "base.ckpt", {p.name: p.asnumpy() for p in model.get_parameters()})
    yield tmp_path / "base.ckpt"
    setup_runtime("CPU")


@pytest.fixture(params=[True, False])
def multiplies(request, monkeypatch):
    for module in ("ldm.ops", "ldm.generation.pipeline"):
        monkeypatch.setattr(f"{module}.multiplies_bf16", lambda: request.param)
    return request.param


def test_auto_of_the_script_asks_the_kernels_and_the_files_say_what_it_was(base, multiplies, tmp_path, graph_mode):
    """Nothing is computed: the model is not opened before the precision is known."""

    def open_model(*_, **__):
        raise UserError("opened")

    settings = GenerateSettings(
        prompt="a cat", config=str(TINY), ckpt_path=str(base), output_path=tmp_path / "out", device_target="CPU",
        H=32, W=32, resume=True,
    )  # fmt: skip
    expected = "bf16" if multiplies else "fp32"
    with pytest.raises(UserError, match="opened"):
        generate.generate(settings, open_model)
    assert current_runtime().precision == expected
    record = tmp_path / "out" / "samples" / "run.json"
    assert json.loads(record.read_text())["precision"] == expected

    # It continues in what it was begun in, here in the other one, or of a version that wrote what was given.
    for written, begun_in in (("fp32", "fp32"), ("bf16", "bf16"), ("auto", "fp32")):
        record.write_text(json.dumps({**json.loads(record.read_text()), "precision": written}))
        with pytest.raises(UserError, match="opened" if begun_in == expected else "other prompts or other files"):
            generate.generate(settings, open_model)
        assert current_runtime().precision == begun_in
    with pytest.raises(UserError, match='is of a run with precision "fp32", not "bf16"'):
        generate.generate(replace(settings, precision="bf16"), open_model)


def test_auto_of_the_pipeline_is_that_of_the_script_unless_mindspore_was_set_up(base, multiplies, monkeypatch):
    dtypes = []

    def set_up(model, dtype, flash):
        dtypes.append(COMPUTE_DTYPES[current_runtime().precision])
        assert dtype == dtypes[-1]

    monkeypatch.setattr("ldm.generation.pipeline.set_up_sampling", set_up)
    for automatic in (lambda: "fp32", lambda: "bf16"):
        setup_runtime("CPU", automatic=automatic)
        Pipeline.from_checkpoint(base, config=TINY)
    monkeypatch.setattr(device, "_current", None)
    Pipeline.from_checkpoint(base, config=TINY)
    assert dtypes == [COMPUTE_DTYPES[name] for name in ("fp32", "bf16", "bf16" if multiplies else "fp32")]


def test_processes_of_other_precisions_are_refused(monkeypatch):
    """Two hosts may have other processors, and the texts of the images name one precision."""
    check_same_precision("bf16", False)
    monkeypatch.setattr("ldm.runtime.peers.are_connected", lambda: True)
    for others, fault in (([], None), (["bf16", "bf16"], None), (["bf16", "fp32"], "process 2 computes in fp32")):
        monkeypatch.setattr("ldm.runtime.peers.gather", lambda data, others=others: [data, *map(str.encode, others)])
        with pytest.raises(UserError, match=fault) if fault else nullcontext():
            check_same_precision("bf16", False)
    ways = {False: "their processors differ: give --precision fp32", True: "folders differ: give --precision bf16"}
    for resumes, way in ways.items():
        with pytest.raises(UserError, match=way):
            check_same_precision("bf16", resumes)
    monkeypatch.setattr("ldm.runtime.peers.gather", lambda data: [])  # in the other processes
    check_same_precision("fp32", False)
