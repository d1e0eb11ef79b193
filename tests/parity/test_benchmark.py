"""tools/benchmark: the sides of diffusers and OpenVINO with a tiny model: precisions agree, and all kinds run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.settings.model import load_model_config
from tests.conftest import ROOT
from tools.benchmark import inputs, reference, works
from tools.benchmark.model_folder import write_model
from tools.benchmark.peers import CPP_KINDS, DIFFUSERS_KINDS, OPENVINO_KINDS
from tools.benchmark.reference import TrainStep, Variant
from tools.benchmark.works import Work

FP32, BF16 = Variant(), Variant(torch.bfloat16)
TINY = ROOT / "tests" / "tiny.yaml"
FP32_BOUND, BF16_BOUND = 1e-3, 0.1  # of the largest value


@pytest.fixture
def config():
    return load_model_config(TINY)


def work(kind: str) -> Work:
    return Work("tiny", "tiny", kind, TINY, 2, 8)


def call(kind, config, variant):
    """Build a workload with the same random weights each time, and call it."""
    torch.manual_seed(works.SEED)
    return reference.KINDS[kind](work(kind), config, variant)()


def error(found, wanted) -> float:
    found, wanted = (np.asarray(torch.as_tensor(array).float()) for array in (found, wanted))
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("kind", ["unet", "decode", "text"])
def test_bf16_is_rounded_fp32(kind, config):
    found = call(kind, config, BF16)
    assert found.dtype == torch.bfloat16
    assert 0 < error(found, call(kind, config, FP32)) < BF16_BOUND


@pytest.mark.parametrize("kind", ["epoch", "generate", "hires", "inpainting", "tiled"])
@pytest.mark.parametrize("variant", [FP32, BF16], ids=["fp32", "bf16"])
def test_the_workloads_run(kind, variant, config, monkeypatch):
    monkeypatch.setattr(works, "STEPS", 2)
    monkeypatch.setattr(inputs, "EPOCH_IMAGES", 2)
    call(kind, config, variant)


def test_a_training_in_bf16_keeps_the_lora_in_fp32(config):
    losses = {}
    for variant in (FP32, BF16):
        torch.manual_seed(works.SEED)
        step = TrainStep(config, variant, full=False)
        given = reference.given(config, work("lora"), variant, "latents", "noise", "timesteps", "text_embeddings")
        before = [p.detach().clone() for p in step.trained]
        losses[variant] = [step(*given) for _ in range(3)]
        assert all(p.dtype == torch.float32 for p in step.trained)
        assert all(p.dtype == variant.dtype for p in step.unet.parameters() if not p.requires_grad)
        assert not all(torch.equal(p, old) for p, old in zip(step.trained, before))
    assert losses[BF16] != losses[FP32]
    assert losses[BF16] == pytest.approx(losses[FP32], rel=0.05)


def test_the_table_of_peers_names_the_kinds_that_there_are():
    assert {*reference.KINDS, "script"} == set(DIFFUSERS_KINDS)
    assert set(CPP_KINDS) | set(OPENVINO_KINDS) <= set(DIFFUSERS_KINDS)


def test_a_script_writes_its_image(config, tmp_path, monkeypatch):
    write_model(tmp_path / "model", config)
    monkeypatch.setattr(works, "STEPS", 2)
    reference.script(work("script"), config, BF16, tmp_path, tmp_path / "image.png")
    assert (tmp_path / "image.png").is_file()


class TestOpenVINO:
    @pytest.fixture
    def openvino(self):
        pytest.importorskip("openvino", reason="OpenVINO is not installed here: `make test-peers` runs this")
        from tools.benchmark import openvino_worker

        return openvino_worker

    @pytest.mark.parametrize("precision, low, high", [("fp32", 0, FP32_BOUND), ("bf16", FP32_BOUND, BF16_BOUND)])
    @pytest.mark.parametrize("kind", ["unet", "decode"])
    def test_it_computes_what_diffusers_computes(self, openvino, kind, precision, low, high, config):
        if precision == "bf16" and not openvino.has_bf16():
            pytest.skip("OpenVINO has no bf16 on this processor")
        torch.manual_seed(works.SEED)
        found = openvino.KINDS[kind](work(kind), config, precision)()
        assert low <= error(found, call(kind, config, FP32)) < high

    def test_the_table_of_peers_names_the_kinds_that_there_are(self, openvino):
        assert {*openvino.KINDS, "script"} == set(OPENVINO_KINDS)

    def test_a_script_reads_what_was_converted(self, openvino, config, tmp_path, monkeypatch):
        from PIL import Image

        write_model(tmp_path / "model", config)
        monkeypatch.setattr(works, "STEPS", 2)
        one = Work("tiny", "tiny", "script", TINY, 1, 8)
        openvino.write_converted(one, config, tmp_path)
        openvino.script(one, config, "fp32", tmp_path, tmp_path / "image.png")
        assert Image.open(tmp_path / "image.png").size == (32, 32)
