"""Why a step is not finite: what is known about the inputs, the base model and the trained weights."""

from __future__ import annotations

import numpy as np

from ldm.errors import UserError
from ldm.runtime import peers
from ldm.runtime.launcher import process_name
from ldm.runtime.roll_call import ReportedError
from ldm.training.feed import TensorBatch
from ldm.training.setup import Run
from ldm.weights.checkpoint import read_checkpoint

LARGEST_WEIGHT = 1e4  # weights of a network that trains well are below 100


def check_inputs_finite(run: Run, batches: list[TensorBatch]) -> None:
    """Raise UserError if the latents or text embeddings of an image are not finite. A smaller loss scale cannot help.

    Every process calls this after the same step, and the first one raises the error of any of them.

    Args:
        run: The run.
        batches: The micro-batches of this process in the newest step.
    """
    fault = _fault_of_inputs(run, batches)
    own = f"{process_name()}: {fault}" if fault and run.runtime.process_index else fault
    faults = [text.decode("utf-8", "replace") for text in peers.gather(own.encode("utf-8", "replace"))]
    if fault:
        raise UserError(fault)
    for text in filter(None, faults):
        raise ReportedError(text)


def _fault_of_inputs(run: Run, batches: list[TensorBatch]) -> str:
    """Return what is wrong with this process's inputs, "" if nothing is."""
    first = (run.status.steps_done - 1) * len(batches)
    for number, (latents, _, _, text_embeddings, *_) in enumerate(batches, first):
        rows = run.inputs.rows(number)
        for what, tensor in (("latents", latents), ("text embeddings", text_embeddings)):
            array = tensor.asnumpy()
            not_finite = np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))
            if len(not_finite):
                source = run.inputs.data.source(int(rows[not_finite[0]]))
                return (
                    f"the {what} of {source} are not finite at step {run.status.steps_done}: look at that image "
                    f"and its caption, remove {run.output / 'cache'}, or try --precision fp32; "
                    f"{run.status.how_to_continue()}"
                )
    return ""


def cause_of_not_finite(run: Run) -> str:
    """Return why a step with finite inputs may have a loss that is not finite, and what to do."""
    for parameter in run.model.get_parameters():
        if not parameter.requires_grad and not np.isfinite(parameter.asnumpy()).all():
            return (
                f"{parameter.name} of {run.settings.pretrained_model_path} holds values that are not finite: "
                "use another checkpoint"
            )
    if run.status.last_state is not None:
        arrays, _ = read_checkpoint(run.status.last_state)
        largest = max(np.abs(array).max() for name, array in arrays.items() if name.startswith("p."))
        if not largest <= LARGEST_WEIGHT:  # also if it is not finite
            return (
                f"the weights were as large as {largest:.3g} in {run.status.last_state} already: resume from an "
                "earlier training state with a lower start_learning_rate, or start again"
            )
    return "lower start_learning_rate, or set clip_grad"
