"""The graphs of both scripts compile for Ascend, with the kernels and the memory that are recorded.

After a change that is meant to change them: python -m tests.ascend.record
"""

from __future__ import annotations

import pytest

from tests.ascend.record import recorded
from tests.ascend.runs import RECORDED
from tools.ascend.dry_run import check_compiled

MEMORY_TOLERANCE = 0.01  # not yet shown to be the same to the byte in every run

compared = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.runs(name), id=name) for name in RECORDED]
)


@compared
def test_every_graph_compiles(runs, name):
    check_compiled(runs[name](), RECORDED[name])


@compared
def test_every_operator_has_the_recorded_kernel_as_often_as_recorded(runs, name):
    expected = recorded(name)
    for graph in runs[name]().graphs:
        assert graph.table()["kernels"] == expected[graph.name]["kernels"], f"{graph.name}: {graph.totals()}"


@compared
def test_every_graph_takes_the_recorded_memory(runs, name):
    expected = recorded(name)
    for graph in runs[name]().graphs:
        assert graph.peak_bytes == pytest.approx(expected[graph.name]["peak_bytes"], rel=MEMORY_TOLERANCE), graph.name


@pytest.mark.runs("flash-O0", "plain-O0")
def test_flash_attention_is_one_kernel_each_way(runs):
    """And plain attention has none of it."""
    flash, plain = (
        {graph.name: {operator for operator, _ in graph.kernels} for graph in runs[name]().graphs}
        for name in ("flash-O0", "plain-O0")
    )
    assert "FlashAttentionScore" in flash["unet"]
    assert {"FlashAttentionScore", "FlashAttentionScoreGrad"} <= flash["step"]
    assert not any(operator.startswith("FlashAttention") for names in plain.values() for operator in names)


@pytest.mark.runs("plain-O0", "first-910-O0")
def test_a_first_910_clears_and_reads_the_flags_of_saturation_once_in_a_step(runs):
    """And an A2, which overflows to infinity, does neither."""
    for name, count in (("first-910-O0", 1), ("plain-O0", 0)):
        (step,) = (graph for graph in runs[name]().graphs if graph.name == "step")
        flags = {operator: n for (operator, _), n in step.kernels.items() if "FloatStatus" in operator}
        assert flags == ({"NPUClearFloatStatusV2": count, "NPUGetFloatStatusV2": count} if count else {})


@pytest.mark.runs("8 cards")
def test_a_step_of_lora_on_eight_cards_averages_the_gradients_at_once(runs):
    done = runs["8 cards"]()
    check_compiled(done, ("step",))
    (step,) = done.graphs
    assert step.kernels["AllReduce", "hccl"] == 1


@pytest.mark.runs("8 cards, whole UNet", "8 cards, whole UNet, divided")
def test_a_divided_optimizer_saves_the_others_moments_and_averages(runs):
    """The first process owns the flat array, 11.4 of 34.4 million parameters."""
    whole, divided = runs["8 cards, whole UNet"](), runs["8 cards, whole UNet, divided"]()
    for done in (whole, divided):
        check_compiled(done, ("step",))
    assert divided.graphs[0].kernels["Broadcast", "hccl"] == 8 and not whole.graphs[0].kernels["Broadcast", "hccl"]
    assert divided.graphs[0].kernels["AllReduce", "hccl"] == whole.graphs[0].kernels["AllReduce", "hccl"] == 16
    saved = whole.graphs[0].peak_bytes - divided.graphs[0].peak_bytes
    assert saved == pytest.approx(3 * 4 * (34_387_972 - 11_384_836), rel=0.05)
