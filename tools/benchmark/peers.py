"""The sides that run.py --peers measures beside this project in fp32: what they are and how their workers start."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.settings.model import load_model_config
from tools.benchmark.inputs import PROMPT
from tools.benchmark.works import SCALE, STEPS, Work

OURS = "ours"
DIFFUSERS_KINDS = (
    "unet", "lora", "full", "epoch", "generate", "euler_a", "long_prompts", "hires", "image_to_image", "inpainting",
    "tiled", "decode", "text", "load", "script",
)  # fmt: skip
OPENVINO_KINDS = ("unet", "generate", "decode", "load", "script")
CPP_KINDS = ("load", "script")


@dataclass(frozen=True)
class Peer:
    """A side of the comparison, which is a column of the table.

    Attributes:
        title: For the table.
        module: Its worker.
        options: Of the worker.
        kinds: The kinds of work that it has. Empty: this project's own, all of them.
        packages: What its Python must have.
        environment: The setting that names its Python, None for this project's.
    """

    title: str
    module: str
    options: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    packages: tuple[str, ...] = ("mindspore", "numpy")
    environment: str | None = None


def _diffusers(title: str, *options: str) -> Peer:
    packages = ("torch", "diffusers", "transformers")
    return Peer(title, "tools.benchmark.reference", options, DIFFUSERS_KINDS, packages, "reference_python")


def _openvino(title: str, *options: str) -> Peer:
    packages = ("openvino", "torch", "diffusers", "transformers")
    return Peer(title, "tools.benchmark.openvino_worker", options, OPENVINO_KINDS, packages, "peers_python")


def _cpp(title: str, *options: str) -> Peer:
    packages = ("stable_diffusion_cpp",)
    return Peer(title, "tools.benchmark.cpp_worker", options, CPP_KINDS, packages, "peers_python")


BF16, COMPILE = ("--precision", "bf16"), ("--compile",)
SIDES = {
    OURS: Peer("this project, fp32", "tools.benchmark.ours"),
    "ours-bf16": Peer("this project, bf16", "tools.benchmark.ours", BF16),
    "diffusers": _diffusers("diffusers, fp32"),
    "diffusers-bf16": _diffusers("diffusers, bf16", *BF16),
    "compile": _diffusers("torch.compile, fp32", *COMPILE),
    "compile-bf16": _diffusers("torch.compile, bf16", *BF16, *COMPILE),
    "openvino": _openvino("OpenVINO, fp32"),
    "openvino-bf16": _openvino("OpenVINO, bf16", *BF16),
    "sd.cpp": _cpp("stable-diffusion.cpp, fp32"),
    "sd.cpp-bf16": _cpp("stable-diffusion.cpp, bf16", *BF16),
}
PEERS = tuple(name for name in SIDES if name != OURS)
ALL = "all"


def is_ours(side: str) -> bool:
    """Tell whether the side is this project."""
    return SIDES[side].environment is None


def compared_with(side: str, measured: Collection[str]) -> str | None:
    """Return the side of this project that a side's ratio is about: that of the same precision, else fp32.

    This project in bf16 is compared with itself in fp32, which has no ratio.
    """
    if side == OURS:
        return None
    same = "ours-bf16" if side.endswith("-bf16") else OURS
    return same if same in measured and same != side else OURS


def groups(sides: Sequence[str], together: int) -> list[list[str]]:
    """Divide the sides into those that run in turns: `together` processes, this project's in each group, 1: none do."""
    if together == 1:
        return [[side] for side in sides]
    ours = [side for side in sides if is_ours(side)]
    others = [side for side in sides if not is_ours(side)]
    if not others:
        return [ours] if ours else []
    room = max(1, together - len(ours))
    return [[*ours, *others[i : i + room]] for i in range(0, len(others), room)]


# Prints {package: version, or null where it is missing} and Python's. It imports none: importing torch takes seconds.
PROGRAM = """
import json, platform, sys
from importlib import metadata
from importlib.util import find_spec
names = getattr(metadata, "packages_distributions", dict)()  # Python 3.9 has none
found = {n: metadata.version(names.get(n, [n])[0]) if find_spec(n) else None for n in sys.argv[1:]}
print(json.dumps({"Python": platform.python_version(), **found}))
"""


class Pythons:
    """The interpreters of the sides.

    Args:
        paths: {the setting's name: the interpreter}, and None -> that of this project.
    """

    def __init__(self, paths: dict[str | None, Path]):
        self.paths = paths
        self._found: dict[tuple[str | None, tuple[str, ...]], dict[str, str | None] | None] = {}

    def packages(self, side: str) -> dict[str, str | None] | None:
        """Return the versions of Python and of what a side needs, None for what is missing, or None without Python."""
        peer = SIDES[side]
        key = (peer.environment, peer.packages)
        if key not in self._found:
            self._found[key] = package_versions(self.paths[peer.environment], peer.packages)
        return self._found[key]

    def missing(self, side: str) -> str | None:
        """Return why a side cannot be measured, such as "not measured: no openvino in .venv-peers", or None."""
        python, packages = self.paths[SIDES[side].environment], self.packages(side)
        if packages is None:
            return f"not measured: no Python at {python}"
        names = [name for name, version in packages.items() if version is None]
        return f"not measured: no {', '.join(names)} in {python}" if names else None

    def worker(self, side: str, work: Work, *more: str) -> list[str]:
        """Return the command of a side's worker."""
        peer = SIDES[side]
        return [str(self.paths[peer.environment]), "-m", peer.module, work.name, *peer.options, *more]

    def script(self, side: str, work: Work, folder: Path, output: Path) -> list[str]:
        """Return the command that makes an image from the model in `folder`: text_to_image.py, or the peer's worker."""
        if not is_ours(side):
            return self.worker(side, work, "--folder", str(folder), "--image", str(output / "image.png"))
        precision = "bf16" if side.endswith("-bf16") else "fp32"
        pixels = work.size * load_model_config(work.config).vae_factor
        settings = {
            "ckpt_path": folder / "model", "prompt": PROMPT, "H": pixels, "W": pixels, "sampling_steps": STEPS,
            "scale": SCALE,
        }  # fmt: skip
        flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
        python = self.paths[None]
        return [str(python), "text_to_image.py", *flags, "--precision", precision, "--output_path", str(output)]


def package_versions(python: str | Path, packages: Sequence[str]) -> dict[str, str | None] | None:
    """Return {package: its version, or None where it is missing} and Python's, or None if the Python does not run."""
    if shutil.which(python) is None:
        return None
    found = subprocess.run([python, "-c", PROGRAM, *packages], capture_output=True, text=True)
    return json.loads(found.stdout) if found.returncode == 0 else None
