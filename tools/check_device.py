"""Check that a device computes what the CPU computes, the first thing to run on a new machine.

    python tools/check_device.py                                    # the Ascend of this machine, DEVICE_ID chooses it
    python tools/check_device.py --device_target CPU                # the CPU against itself
    python tools/check_device.py --graphs attention unet            # a part of it

It takes a few minutes and needs no checkpoint. It prints versions, memory and how the device is set up, then runs one
small call of each graph on the device and on the CPU, each in a process of its own: text encoder, VAE, UNet with plain
and with flash attention, a LoRA training step, attention at the sizes of Stable Diffusion's heads, and an overflow. The
networks have fixed random weights. What it prints is Markdown to paste into a report. Exit code 0 if everything is
right, 1 if not.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's folder, where this is run as a script

from ldm.runtime.script import run_script, start_script  # noqa: E402

if __name__ == "__main__":
    start_script()

import numpy as np  # noqa: E402

from ldm.errors import UserError, plain  # noqa: E402
from ldm.runtime import subprocesses  # noqa: E402
from ldm.settings.declare import setting  # noqa: E402
from ldm.settings.model import parse_model_config  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402

# A UNet with heads of 40 and 80 channels as in SD1.x, two levels, attention at both.
MODEL = {
    "architecture": "custom",
    "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
    "params": {
        "linear_start": 0.00085,
        "linear_end": 0.0120,
        "timesteps": 1000,
        "image_size": 8,
        "scale_factor": 0.5,
        "unet_config": {
            "target": "ldm.models.unet.UNetModel",
            "params": {
                "in_channels": 4, "out_channels": 4, "model_channels": 160, "attention_resolutions": [2, 1],
                "num_res_blocks": 1, "channel_mult": [1, 2], "num_heads": 4, "transformer_depth": 1, "context_dim": 64,
            },
        },
        "first_stage_config": {
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {
                "embed_dim": 4,
                "ddconfig": {
                    "double_z": True, "z_channels": 4, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2, 2],
                    "num_res_blocks": 1,
                },
            },
        },
        "cond_stage_config": {
            "target": "ldm.models.text_encoder.CLIPTextEncoder",
            "params": {"width": 64, "num_layers": 2, "num_heads": 2, "activation": "quick_gelu"},
        },
    },
}  # fmt: skip

HEAD_SIZES = (40, 64, 80, 160)  # SD1.x has 40, 80 and 160, SD2.x has 64
OVERFLOW = "overflow"
GRAPHS = (OVERFLOW, "attention", "text_encoder", "vae_encode", "vae_decode", "unet", "unet_flash", "lora_step")

# Largest deviation ||device - CPU|| / ||CPU|| that is taken for rounding. In fp16 on the CPU, the largest of these
# graphs is 3e-3 from fp32. CANN computes fp32 convolutions in HF32 by default, with 10 bits of mantissa as fp16 has.
LIMITS = {"fp16": 2e-2, "fp32": 5e-3}

# What MindSpore and this project raise where a graph cannot be built, compiled or run.
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, OSError, MemoryError)
FAILURES += (UserError, AssertionError, ImportError, NameError)

# A whole step of SD1.5 with LoRA, 512 pixels, batch 4, flash attention: docs/ascend.md.
NEEDED_GIGABYTES = 10


@dataclass
class Settings:
    """The command line."""

    device_target: Optional[str] = setting(
        None, "device to check; None: Ascend where there is one, else CPU", choices=("Ascend", "CPU")
    )
    precision: str = setting("auto", "auto: fp16 on Ascend, fp32 on the CPU", choices=("auto", "fp16", "fp32"))
    jit_level: Optional[str] = setting(
        None, "optimization level of Ascend's graph compiler", choices=("O0", "O1", "O2")
    )
    graphs: list[str] = setting(list(GRAPHS), "graphs to run", choices=GRAPHS, positional=False)
    into: Optional[str] = setting(None, path=True)  # a folder: compute for the process that compares


@dataclass
class Graph:
    """What a process found out about one graph."""

    name: str
    precision: str = ""
    seconds: float = 0.0
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    error: str = ""  # why it did not run
    skipped: str = ""  # why it was left out


@dataclass
class Row:
    """A line of the report."""

    name: str
    deviation: str
    limit: str
    seconds: float
    verdict: str  # "OK", "WRONG", or "skipped"
    reason: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check and return the exit code."""
    settings = read_settings(Settings, argv, description=__doc__)
    if settings.into is not None:
        compute(settings, Path(settings.into))
        return 0
    with tempfile.TemporaryDirectory(prefix="check_device-") as folder:
        print("the CPU computes ...", file=sys.stderr, flush=True)
        cpu_process = _run("CPU", "fp32", settings, Path(folder) / "cpu")
        cpu_graphs = [_read(Path(folder) / "cpu", name, cpu_process) for name in settings.graphs]
        print("the device computes ...", file=sys.stderr, flush=True)
        process = _run(settings.device_target, settings.precision, settings, Path(folder) / "device")
        about = _about(Path(folder) / "device", process)
        device_graphs = [_read(Path(folder) / "device", name, process) for name in settings.graphs]
    rows = [compare(graph, cpu, about) for graph, cpu in zip(device_graphs, cpu_graphs)]
    problems = find_problems(about, rows)
    print(report(about, rows, problems))
    return 1 if problems or any(row.verdict == "WRONG" for row in rows) else 0


def _run(device: str | None, precision: str, settings: Settings, folder: Path) -> str:
    """Let a process compute the graphs into a folder, and return how it ended, "" for well.

    A process of its own, because MindSpore has one device in a process, and an error in a kernel may end it.
    """
    folder.mkdir()
    command = [sys.executable, __file__, "--into", str(folder), "--precision", precision, "--graphs", *settings.graphs]
    command += ["--device_target", device] if device else []
    environment = dict(os.environ)
    if device == "CPU":
        environment.pop("MS_SIMULATION_LEVEL", None)  # MindSpore's dry run, which computes nothing
    elif settings.jit_level:
        command += ["--jit_level", settings.jit_level]
    log = folder / "log.txt"
    with open(log, "wb") as output:
        code = subprocesses.run(command, stdout=output, stderr=output, env=environment)
    if code == 0:
        return ""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")] or lines or [""]
    ended = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return f"the process {ended}: {plain(errors[-1].removeprefix('error: '), 300)}"


def compute(settings: Settings, folder: Path) -> None:
    """Compute the graphs on one device and write each result into `folder` as soon as it is there."""
    from ldm.runtime.device import setup_runtime

    runtime = setup_runtime(settings.device_target, 0, settings.jit_level, settings.precision)
    graphs = _Graphs(runtime)
    graphs.overflow()  # it opens the device, so its memory can be asked for
    (folder / "about.json").write_text(json.dumps(describe(runtime)))
    for name in settings.graphs:
        graph = Graph(name)
        began = time.perf_counter()
        try:
            graph.arrays, graph.precision, graph.skipped = getattr(graphs, name)()
        except FAILURES as error:
            lines = [line for line in str(error).splitlines() if line.strip()] or [""]
            graph.error = plain(f"{type(error).__name__}: {lines[0]}", 300)
        graph.seconds = time.perf_counter() - began
        np.savez(folder / f"{name}.npz", **graph.arrays)
        (folder / f"{name}.json").write_text(json.dumps({**asdict(graph), "arrays": None}))


def _read(folder: Path, name: str, process: str) -> Graph:
    """Return what a process wrote about a graph, or how it ended before."""
    if not (folder / f"{name}.json").is_file():
        return Graph(name, error=process or "it left no result")
    with np.load(folder / f"{name}.npz") as arrays:
        graph = Graph(**json.loads((folder / f"{name}.json").read_text()))
        graph.arrays = dict(arrays)
    return graph


def describe(runtime: Any) -> dict[str, Any]:
    """Return versions, memory and how the device is set up, for the report."""
    import mindspore as ms

    from ldm.runtime import ascend
    from ldm.runtime.device import decide_flash_attention, describe_runtime

    flash = decide_flash_attention(None, runtime)
    versions = f"MindSpore {ms.__version__}, Python {platform.python_version()}, numpy {np.__version__}"
    about = {
        "versions": f"{versions}, {platform.system()} {platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "device": describe_runtime(runtime, flash).removeprefix("device: "),
        "ascend": runtime.is_ascend,
        "known": runtime.saturates or runtime.is_a2_or_later,
        "saturates": runtime.saturates,
        "dry_run": runtime.is_ascend and bool(os.environ.get("MS_SIMULATION_LEVEL")),
        "free": 0.0,
        "total": 0.0,
        "cann": "",
        "cann_fault": "",
    }
    if runtime.is_ascend:
        version, accepted = ascend.cann_version(), ascend.accepted_cann_versions()
        about["cann"] = (
            f"{version or 'of unknown version (ASCEND_HOME_PATH is not set, or has no compiler/version.info)'}, "
            f"accepted by this MindSpore: {', '.join(accepted) or 'unknown'}; "
            f"driver {ascend.driver_version() or 'of unknown version'}"
        )
        about["cann_fault"] = ascend.cann_fault(version, accepted)
        try:
            properties = ms.hal.get_device_properties(ms.get_context("device_id"), "Ascend")
            about["free"], about["total"] = properties.free_memory / 2**30, properties.total_memory / 2**30
        except (RuntimeError, ValueError):  # MindSpore's dry run has no device to ask
            pass
    else:
        page = os.sysconf("SC_PAGE_SIZE") / 2**30
        about["free"], about["total"] = os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page
    return about


def _about(folder: Path, process: str) -> dict[str, Any]:
    file = folder / "about.json"
    if not file.is_file():
        raise UserError(f"the device could not be set up ({process}): see docs/ascend.md, or try --device_target CPU")
    return json.loads(file.read_text())


class _Graphs:
    """The graphs by name. Each returns arrays, the precision, and why it was left out."""

    def __init__(self, runtime: Any):
        from ldm.models.layers import set_compute_dtype
        from ldm.models.stable_diffusion import build_model

        self.runtime = runtime
        self.config = parse_model_config({"model": MODEL}, "tools/check_device.py")
        self.set_compute_dtype, self.build_model = set_compute_dtype, build_model
        self.precision = runtime.precision

    def _model(self) -> Any:
        model = self.build_model(self.config)
        fill(model)
        for network in (model.model, model.cond_stage_model):
            self.set_compute_dtype(network, self.runtime.compute_dtype)
        return model

    def overflow(self) -> tuple[dict[str, np.ndarray], str, str]:
        """Double a number near fp16's largest."""
        import mindspore as ms

        doubled = ms.ops.Add()(*[ms.Tensor(np.full(16, 60000, np.float16))] * 2)
        return {"doubled": doubled.asnumpy().astype(np.float32)}, "fp16", ""

    def attention(self) -> tuple[dict[str, np.ndarray], str, str]:
        """Run the attention that the UNet uses here, with its gradients, at each size of a head."""
        from ldm.runtime.device import decide_flash_attention

        flash = decide_flash_attention(None, self.runtime)
        arrays = {}
        for size in HEAD_SIZES:
            arrays.update({f"{size} {name}": array for name, array in self._attention(size, flash).items()})
        return arrays, self.precision, ""

    def _attention(self, size: int, flash: bool) -> dict[str, np.ndarray]:
        import mindspore as ms

        from ldm import ops

        heads, tokens = 2, 256
        cell = ops.attention(heads, size, flash=flash)
        inputs = [
            ms.Tensor(draw(f"{name}{size}", (2, tokens, heads * size))).astype(self.runtime.compute_dtype)
            for name in ("query", "key", "value")
        ]

        class Loss(ms.nn.Cell):
            def __init__(self) -> None:
                super().__init__()
                self.attention = cell
                self.weights = ms.Tensor(draw(f"weights{size}", (2, tokens, heads * size)))

            def construct(self, query: ms.Tensor, key: ms.Tensor, value: ms.Tensor) -> Any:
                out = ms.ops.cast(self.attention(query, key, value, 2), ms.float32)
                return (out.reshape(self.weights.shape) * self.weights).sum(), out

        (_, out), gradients = ms.ops.value_and_grad(Loss(), (0, 1, 2), has_aux=True)(*inputs)
        named = zip(("output", "dQ", "dK", "dV"), (out, *gradients))
        return {name: array.asnumpy().astype(np.float32) for name, array in named}

    def text_encoder(self) -> tuple[dict[str, np.ndarray], str, str]:
        """Encode two texts of arbitrary tokens."""
        tokens = np.random.default_rng(0).integers(0, 49407, (2, 77)).astype(np.int32)
        return self._call(self._model().cond_stage_model, tokens), self.precision, ""

    def vae_encode(self) -> tuple[dict[str, np.ndarray], str, str]:
        """Encode an image. The VAE computes in fp32 on any device."""
        from ldm.models.autoencoder import VAEEncode

        image = draw("image", (1, 3, 32, 32))
        return self._call(VAEEncode(self._model().first_stage_model), image), "fp32", ""

    def vae_decode(self) -> tuple[dict[str, np.ndarray], str, str]:
        """Decode latents."""
        from ldm.models.autoencoder import VAEDecode

        latents = draw("latents", (1, 4, 8, 8))
        return self._call(VAEDecode(self._model().first_stage_model), latents), "fp32", ""

    def unet(self, flash: bool = False) -> tuple[dict[str, np.ndarray], str, str]:
        """Predict the noise, with plain attention."""
        from ldm.models.attention import use_flash_attention

        model = self._model()
        use_flash_attention(model.model, flash)
        inputs = draw("latents", (2, 4, 8, 8)), np.array([10, 900], np.int32), self._texts()
        return self._call(model.model.diffusion_model, *inputs), self.precision, ""

    def unet_flash(self) -> tuple[dict[str, np.ndarray], str, str]:
        """Predict the noise, with flash attention where it exists."""
        from ldm.runtime.device import decide_flash_attention

        if not self.runtime.is_ascend:  # the reference is the same network with plain attention
            return self.unet()
        if not decide_flash_attention(None, self.runtime):
            return {}, self.precision, "flash attention does not exist here, see docs/ascend.md"
        return self.unet(flash=True)

    def lora_step(self) -> tuple[dict[str, np.ndarray], str, str]:
        """Train a LoRA for one step: loss, gradients (as AdamW's first moment) and trained parameters."""
        import mindspore as ms

        from ldm.diffusion.loss import DiffusionLoss
        from ldm.diffusion.schedule import NoiseSchedule
        from ldm.lora.inject import inject_lora
        from ldm.lora.spec import LoRASpec
        from ldm.models.attention import use_flash_attention
        from ldm.runtime.device import decide_flash_attention
        from ldm.training.optimizers import adamw_scalars
        from ldm.training.step import StepScalars, TrainStep

        model = self._model()
        inject_lora(model, LoRASpec(rank=4))
        trainable = list(model.trainable_params())
        for parameter in trainable:
            parameter.set_data(ms.Tensor(0.05 * draw(parameter.name, parameter.shape)))
        if decide_flash_attention(None, self.runtime):
            use_flash_attention(model.model, True)
        unet = model.model.diffusion_model
        loss = DiffusionLoss(unet, NoiseSchedule.from_config(self.config), self.config.prediction_type)
        step = TrainStep(loss, trainable, skip_overflow=True, saturates=self.runtime.saturates and self.runtime.fp16)
        scalars = StepScalars(1024.0, 1 / 1024, 1.0, adamw_scalars(1, 1e-4, (0.9, 0.999), 1e-8, 0.01), 1e-4)
        batch = draw("latents", (2, 4, 8, 8)), draw("noise", (2, 4, 8, 8)), np.array([10, 900], np.int32), self._texts()
        result = step([tuple(ms.Tensor(array) for array in batch)], scalars)
        state = step.state()
        arrays = {"loss": np.array([result.loss], np.float32), "norm": np.array([result.gradient_norm], np.float32)}
        for group, label in (("m", "gradients"), ("p", "parameters")):
            arrays[label] = np.concatenate([state[f"{group}.{p.name}"].ravel() for p in trainable])
        return arrays, self.precision, ""

    def _texts(self) -> np.ndarray:
        return draw("texts", (2, 77, self.config.context_dim))

    def _call(self, network: Any, *inputs: np.ndarray) -> dict[str, np.ndarray]:
        import mindspore as ms

        network.set_train(False)
        return {"output": network(*(ms.Tensor(array) for array in inputs)).asnumpy().astype(np.float32)}


def draw(name: str, shape: Sequence[int]) -> np.ndarray:
    """Return normal random numbers that depend on the name alone, in fp32."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(shape), np.float32)


def fill(model: Any) -> None:
    """Give a model random weights that depend on their names alone, so that no layer is without effect."""
    import mindspore as ms

    for parameter in model.get_parameters():
        values = draw(parameter.name, parameter.shape)
        if values.ndim > 1:
            values /= np.sqrt(np.prod(values.shape[1:], dtype=np.float32))
        else:  # of a bias, or of a norm
            values = 0.1 * values + (0.0 if parameter.name.endswith("bias") else 1.0)
        parameter.set_data(ms.Tensor(values))


def compare(graph: Graph, cpu: Graph, about: dict[str, Any]) -> Row:
    """Compare what the device computed of a graph with what the CPU computed."""
    seconds = graph.seconds
    if graph.skipped:
        return Row(graph.name, "", "", seconds, "skipped", graph.skipped)
    if graph.error:
        return Row(graph.name, "", "", seconds, "WRONG", graph.error)
    if cpu.error:
        return Row(graph.name, "", "", seconds, "WRONG", f"the CPU did not compute it, {cpu.error}")
    if graph.name == OVERFLOW:
        return _compare_overflow(graph, about["saturates"])
    limit = LIMITS["fp16" if about["saturates"] else graph.precision]
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
    return Row(
        graph.name, text, f"{expected:g}", graph.seconds, "WRONG" if wrong else "OK",
        "an overflow of fp16 gives neither infinity nor the largest number as this device should" if wrong else "",
    )  # fmt: skip


def deviation(values: np.ndarray, reference: np.ndarray) -> float:
    """Return ||values - reference|| / ||reference||, or infinity for another shape and nan for what is not finite."""
    if values.shape != reference.shape:
        return np.inf
    difference = values.astype(np.float64) - reference
    with np.errstate(invalid="ignore"):
        return float(np.linalg.norm(difference) / max(np.linalg.norm(reference.astype(np.float64)), 1e-30))


def find_problems(about: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    """Return what is wrong beyond single graphs, and the ways out."""
    problems = []
    if about["dry_run"]:
        problems.append(
            "This is MindSpore's dry run (MS_SIMULATION_LEVEL is set): kernels are not run, so no value can be right. "
            "Unset it on a machine with a device."
        )
    if about["cann_fault"]:
        problems.append(about["cann_fault"] + ".")
    if about["ascend"] and not about["known"] and not about["dry_run"]:
        problems.append(
            "The device's name is unknown to this project, so flash attention is off and the precision mode is "
            "MindSpore's: only the Ascend 910, Atlas A2 and A3 series are known."
        )
    wrong = {row.name for row in rows if row.verdict == "WRONG"}
    if not wrong or about["dry_run"]:
        return problems
    right = {row.name for row in rows if row.verdict == "OK"}
    if "unet_flash" in wrong and "unet" in right:
        problems.append("Flash attention is wrong and plain attention is right: use --enable_flash_attention False.")
    if OVERFLOW in wrong and not about["saturates"]:
        problems.append(
            "fp16 does not overflow to infinity, so loss scaling is blind: unset MS_ASCEND_CHECK_OVERFLOW_MODE, or use "
            "--precision fp32."
        )
    if about["ascend"] and wrong - {OVERFLOW}:
        problems.append(
            "Try another level of the compiler (--jit_level O0, O1 or O2) and --precision fp32: whether that is right "
            "narrows down the fault."
        )
    return problems


def report(about: dict[str, Any], rows: Sequence[Row], problems: Sequence[str]) -> str:
    """Return the whole report as Markdown."""
    wrong = sum(row.verdict == "WRONG" for row in rows)
    skipped = sum(row.verdict == "skipped" for row in rows)
    memory = f"{about['free']:.1f} of {about['total']:.1f} GB free" if about["total"] else "unknown"
    if about["ascend"] and about["total"] and about["free"] < NEEDED_GIGABYTES:
        memory += f" (SD1.5 with LoRA at 512 pixels, batch 4, needs about {NEEDED_GIGABYTES} GB)"
    lines = ["### Device check", "", "| | |", "| --- | --- |", f"| software | {about['versions']} |"]
    lines += [f"| CANN | {about['cann']} |"] if about["cann"] else []
    lines += [f"| device | {about['device']} |", f"| memory | {memory} |", ""]
    lines += ["| graph | deviation from the CPU | limit | seconds | verdict |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        verdict = row.verdict + (f": {row.reason}" if row.reason else "")
        lines.append(f"| {row.name} | {row.deviation} | {row.limit} | {row.seconds:.1f} | {_cell(verdict)} |")
    counts = f"{wrong} of {len(rows)} graphs are wrong" if wrong else f"all {len(rows) - skipped} graphs agree"
    lines += ["", f"**{'WRONG' if wrong or problems else 'OK'}**: {counts}, {skipped} skipped."]
    lines += [f"- {problem}" for problem in problems]
    if about["ascend"] and not about["dry_run"]:
        lines += ["", "Please send this report to the project, right or wrong: nobody has run it on this device yet."]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _script() -> None:
    """Run the tool as a script. A check that fails is a result, not an error, and has exit code 1."""
    code = main()
    sys.stdout.flush()
    if code:
        sys.exit(code)


if __name__ == "__main__":
    run_script(_script)
