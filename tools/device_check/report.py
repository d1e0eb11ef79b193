"""What the device computed against what the CPU computed, what is wrong, and the report as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tools.device_check.results import OVERFLOW, Graph, Machine

# Largest deviation ||device - CPU|| / ||CPU|| that is taken for rounding. In fp16 on the CPU, the largest of these
# graphs is 3e-3 from fp32. CANN computes fp32 convolutions in HF32 by default, with 10 bits of mantissa as fp16 has.
LIMITS = {"fp16": 2e-2, "fp32": 5e-3}

# What a step of SD1.5 with LoRA, 512 pixels, batch 4, takes with plain and with flash attention, by the dry run
# (docs/ascend.md, "Launches and memory"). CANN's workspaces and its own memory are not in it: the margin is for these,
# and an estimate.
STEP_GIGABYTES = {False: 9.2, True: 5.5}
MARGIN_GIGABYTES = 2.0


@dataclass
class Row:
    """A line of the report."""

    name: str
    deviation: str
    limit: str
    seconds: float
    verdict: str  # "OK", "WRONG", or "skipped"
    reason: str = ""


def compare(graph: Graph, cpu: Graph, machine: Machine) -> Row:
    """Compare what the device computed of a graph with what the CPU computed."""
    seconds = graph.seconds
    if graph.skipped:
        return Row(graph.name, "", "", seconds, "skipped", graph.skipped)
    if graph.error:
        return Row(graph.name, "", "", seconds, "WRONG", graph.error)
    if cpu.error:
        return Row(graph.name, "", "", seconds, "WRONG", f"the CPU did not compute it, {cpu.error}")
    if graph.name == OVERFLOW:
        return _compare_overflow(graph, machine.saturates)
    limit = LIMITS["fp16" if machine.is_first_910 else graph.precision]
    deviations = {name: deviation(graph.arrays[name], cpu.arrays[name]) for name in cpu.arrays}
    # Of several arrays, the worst is shown. A deviation that is not a number is the worst of all.
    worst = max(deviations, key=lambda name: np.nan_to_num(deviations[name], nan=np.inf))
    value = deviations[worst]
    wrong = not value <= limit
    label = f"{value:.1e}" + (f" ({worst})" if len(deviations) > 1 else "")
    reason = "" if not wrong else "not finite" if not np.isfinite(value) else "differs from the CPU"
    return Row(graph.name, label, f"{limit:.0e}", seconds, "WRONG" if wrong else "OK", reason)


def _compare_overflow(graph: Graph, saturates: bool) -> Row:
    value = float(graph.arrays["doubled"][0])
    expected = np.float32(np.finfo(np.float16).max) if saturates else np.inf
    wrong = value != expected
    text = f"60000 + 60000 = {value:g} in fp16"
    reason = f"an overflow of fp16 must give {expected:g} on this device" if wrong else ""
    return Row(graph.name, text, f"{expected:g}", graph.seconds, "WRONG" if wrong else "OK", reason)


def deviation(values: np.ndarray, reference: np.ndarray) -> float:
    """Return ||values - reference|| / ||reference||, or infinity for another shape and nan for what is not finite."""
    if values.shape != reference.shape:
        return np.inf
    difference = values.astype(np.float64) - reference
    with np.errstate(invalid="ignore"):
        return float(np.linalg.norm(difference) / max(np.linalg.norm(reference.astype(np.float64)), 1e-30))


def find_problems(machine: Machine, rows: Sequence[Row]) -> list[str]:
    """Return what is wrong beyond single graphs, and the ways out."""
    problems = []
    if machine.dry_run:
        problems.append(
            "This is MindSpore's dry run (MS_SIMULATION_LEVEL is set): kernels are not run, so no value can be right. "
            "Unset it on a machine with a device."
        )
    if machine.cann_fault:
        problems.append(machine.cann_fault + ".")
    if machine.ascend and not machine.known and not machine.dry_run:
        problems.append(
            "The device's name is unknown to this project, so flash attention is off and the precision mode is "
            "MindSpore's: only the Ascend 910, Atlas A2 and A3 series are known."
        )
    wrong = {row.name for row in rows if row.verdict == "WRONG"}
    if not wrong or machine.dry_run:
        return problems
    right = {row.name for row in rows if row.verdict == "OK"}
    if "unet_flash" in wrong and "unet" in right:
        problems.append("Flash attention is wrong and plain attention is right: use --enable_flash_attention False.")
    if OVERFLOW in wrong and not machine.saturates:
        problems.append(
            "fp16 does not overflow to infinity, so loss scaling is blind: unset MS_ASCEND_CHECK_OVERFLOW_MODE, or use "
            "--precision fp32."
        )
    if machine.ascend and wrong - {OVERFLOW}:
        problems.append(
            "Try another level of the compiler (--jit_level O0 or O1) and --precision fp32: whether that is right "
            "narrows down the fault."
        )
    return problems


def report(machine: Machine, rows: Sequence[Row], problems: Sequence[str]) -> str:
    """Return the whole report as Markdown."""
    wrong = sum(row.verdict == "WRONG" for row in rows)
    skipped = sum(row.verdict == "skipped" for row in rows)
    memory = f"{machine.free:.1f} of {machine.total:.1f} GB free" if machine.total else "unknown"
    needed = STEP_GIGABYTES[machine.flash_attention] + MARGIN_GIGABYTES
    if machine.ascend and machine.total and machine.free < needed:
        memory += f" (SD1.5 with LoRA at 512 pixels, batch 4, needs about {needed:.0f} GB)"
    lines = ["### Device check", "", "| | |", "| --- | --- |", f"| software | {machine.versions} |"]
    lines += [f"| CANN | {machine.cann} |"] if machine.cann else []
    lines += [f"| device | {machine.device} |", f"| memory | {memory} |", ""]
    lines += ["| graph | deviation from the CPU | limit | seconds | verdict |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        verdict = row.verdict + (f": {row.reason}" if row.reason else "")
        lines.append(f"| {row.name} | {row.deviation} | {row.limit} | {row.seconds:.1f} | {_cell(verdict)} |")
    counts = f"{wrong} of {len(rows)} graphs are wrong" if wrong else f"all {len(rows) - skipped} graphs agree"
    lines += ["", f"**{'WRONG' if wrong or problems else 'OK'}**: {counts}, {skipped} skipped."]
    lines += [f"- {problem}" for problem in problems]
    if machine.ascend and not machine.dry_run:
        lines += ["", "Please send this report to the project, right or wrong: nobody has run it on this device yet."]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
