"""Measure time and memory of loading and converting a full-size base model with random weights.

    python tools/benchmark/load_checkpoint.py
    python tools/benchmark/load_checkpoint.py --model_config configs/v2-inference.yaml --folder /tmp

For Stable Diffusion 1.x, it needs 6 GB of memory and temporarily 15 GB of disk in --folder. Each row is measured in its
own process. "Own memory" is the growth of RssAnon, which the system cannot reclaim. "Resident" is the growth of VmRSS,
which includes mapped files and can be reclaimed. Both are the largest of samples taken every 5 ms, also given as
multiples of the size of the weights in fp32.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ldm.runtime.script import run_script, start_script  # noqa: E402

if __name__ == "__main__":
    start_script()

from ldm.errors import UserError  # noqa: E402
from ldm.files.atomic import temporary_folder  # noqa: E402
from ldm.files.inputs import check_file, is_folder  # noqa: E402
from ldm.settings.declare import setting  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402


def memory() -> dict[str, int]:
    """Return RssAnon and VmRSS of this process in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(status[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS")}


def measured(work: Callable[[], object]) -> dict[str, float]:
    """Return the wall and CPU seconds of `work`, and the largest growth of both kinds of memory."""
    before = memory()
    most, done = dict(before), threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            for name, size in memory().items():
                most[name] = max(most[name], size)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began, used = time.perf_counter(), time.process_time()
    try:
        work()
    finally:
        seconds, busy = time.perf_counter() - began, time.process_time() - used
        done.set()
        watcher.join()
    return {"seconds": seconds, "busy": busy, **{name: most[name] - before[name] for name in most}}


def write_random(config_path: str, target: Path) -> None:
    """Write a single file with random fp32 weights of the model, one array at a time, and its YAML beside it."""
    import numpy as np

    from ldm.models.stable_diffusion import build_model
    from ldm.settings.model import load_model_config
    from ldm.weights.arrays import Arrays
    from ldm.weights.checkpoint import write_checkpoint

    config = load_model_config(config_path)
    shapes = {p.name: tuple(p.shape) for p in build_model(config, random=False).get_parameters()}
    generator = np.random.default_rng(0)

    class Random(Arrays):
        def spec(self, name: str) -> tuple[np.dtype, tuple[int, ...]]:
            return np.dtype("<f4"), shapes[name]

        def __getitem__(self, name: str) -> np.ndarray:
            return generator.random(shapes[name], np.float32)

        def __iter__(self) -> Iterator[str]:
            return iter(shapes)

        def __len__(self) -> int:
            return len(shapes)

    target.with_suffix(".yaml").write_bytes(Path(config_path).read_bytes())
    write_checkpoint(target, Random(), {"architecture": config.architecture, "prediction_type": config.prediction_type})


def measure_load(config_path: str, source: str, precision: str = "fp32") -> dict[str, float]:
    """Measure what both scripts do first: build the networks and load a checkpoint into them."""
    from ldm.generation.loading import load_model, set_up_sampling
    from ldm.runtime.device import setup_runtime
    from ldm.settings.model import load_model_config

    config = load_model_config(config_path)
    dtype = setup_runtime("CPU", precision=precision).compute_dtype
    models = []

    def work() -> None:
        models.append(load_model(config, source, prepare=lambda model: set_up_sampling(model, dtype, False)))

    return {**measured(work), "weights": sum(4.0 * p.size for p in models[0].get_parameters())}


def measure_convert(source: str, target: str, dtype: str) -> dict[str, float]:
    """Measure a conversion."""
    from ldm.weights.convert import convert

    return measured(lambda: convert(source, target, dtype=dtype))


MEASURES: dict[str, Callable[..., dict[str, float]]] = {"load": measure_load, "convert": measure_convert}


def in_a_process(*arguments: str) -> dict[str, float]:
    """Run a measurement in its own process."""
    result = subprocess.run([sys.executable, __file__, "--measure", *arguments], capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"{' '.join(arguments)} ended with {result.returncode}: {result.stderr.strip()[-400:]}")
    return json.loads(result.stdout.splitlines()[-1])


@dataclass
class Settings:
    """The command line."""

    model_config: str = setting(
        str(ROOT / "configs" / "v1-inference.yaml"), "the model's YAML, Stable Diffusion 1.x by default", path=True
    )
    folder: Path = setting(Path(tempfile.gettempdir()), "folder for temporary files", path=True)
    measure: list[str] = setting([])  # for the processes that are measured


def main() -> None:
    args = read_settings(Settings, description=__doc__)
    if args.measure:
        kind, *rest = args.measure
        print(json.dumps(MEASURES[kind](*rest)))
        return
    check_file(args.model_config, "--model_config")
    if not is_folder(args.folder, "--folder"):
        raise UserError(f"--folder {args.folder} is not a folder: give one with 15 GB of free disk")
    with temporary_folder(args.folder / "load_checkpoint") as temporary:
        names = ("base.safetensors", "mindone.ckpt", "folder", "half.safetensors")
        base, mindone, folder, half = (temporary / name for name in names)
        print("writing random weights ...", file=sys.stderr, flush=True)
        write_random(args.model_config, base)
        rows: list[tuple[str, dict[str, float]]] = []
        for source, target, dtype in (
            (base, mindone, "keep"),
            (mindone, folder, "keep"),
            (folder, half, "fp16"),
            (half, None, ""),
        ):
            rows.append((f"load {source.name}", in_a_process("load", args.model_config, str(source))))
            if source in (base, half):
                measured_in_bf16 = in_a_process("load", args.model_config, str(source), "bf16")
                rows.append((f"load {source.name} for bf16", measured_in_bf16))
            if target is not None:
                what = f"convert {source.name} to {target.name}{', fp16' if dtype == 'fp16' else ''}"
                rows.append((what, in_a_process("convert", str(source), str(target), dtype)))
            print(rows[-1][0], file=sys.stderr, flush=True)
        weights = rows[0][1]["weights"]
        print(f"{Path(args.model_config).name}: {weights / 1e9:.2f} GB of weights in fp32\n")
        print("| work | seconds | processor, s | own memory, peak | resident, peak |\n" + "| --- " * 5 + "|")
        for what, found in rows:
            own, resident = found["RssAnon"], found["VmRSS"]
            print(
                f"| {what} | {found['seconds']:.1f} | {found['busy']:.1f} | "
                f"{own / 1e9:.2f} GB, {own / weights:.2f}x | {resident / 1e9:.2f} GB, {resident / weights:.2f}x |"
            )


if __name__ == "__main__":
    run_script(main)
