"""Both scripts run from beginning to end on the simulated device.

It computes nothing: every value that a graph returns is 0, so the losses are 0, and the check for finite gradients says
no. A script that trains therefore skips its steps as overflows. The tests show that the graphs compile and that the
runtime can start them. They say nothing about results.
"""

from __future__ import annotations

import pytest


def assert_trained(done, steps: int) -> None:
    assert done.exit_code == 0, done.text[-3000:]
    assert f"{steps} of {steps} steps overflowed" in done.text and "done:" in done.text


@pytest.mark.runs("train nano")
def test_training_the_nano_model(runs):
    done = runs["train nano"]()
    assert_trained(done, 2)
    assert done.kernels["FlashAttentionScoreGrad", "aclnn"]


@pytest.mark.runs("generate nano")
def test_generating_with_the_nano_model(runs):
    done = runs["generate nano"]()
    assert done.exit_code == 0, done.text[-3000:]
    assert "1 images" in done.text
    assert done.kernels["FlashAttentionScore", "aclnn"]


@pytest.mark.runs("sink")
def test_batches_go_through_the_data_queue(runs):
    done = runs["sink"]()
    assert_trained(done, 4)  # the result of the third is read late
    assert any(operator == "GetNext" for operator, _ in done.kernels), sorted(done.kernels)


@pytest.mark.runs("compile cache")
def test_a_resumed_run_reads_the_compiled_step(runs):
    first, second = runs["compile cache"]()
    assert_trained(first, 2)
    assert_trained(second, 4)
    assert (first.graphs_from_cache, second.graphs_from_cache) == (0, 1)
