"""What every test stands on: a quiet MindSpore, fixed seeds, graph mode where a test asks for it, a tiny model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile

# Before MindSpore is imported, here or in a process that a test starts.
os.environ.setdefault("GLOG_v", "3")

from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402

ROOT = Path(__file__).parents[1]


def dump_graphs(module: str, folder: Path) -> None:
    """Run a module that compiles graphs and writes them into `folder`, in a process of its own."""
    run = subprocess.run([sys.executable, "-m", module, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def validated_graphs(folder: Path) -> str:
    """The text of the graphs there as they are after the compiler's last check."""
    return "".join(path.read_text(errors="replace") for path in folder.glob("*_validate_*.ir"))


@pytest.fixture(autouse=True)
def fixed_seed():
    np.random.seed(0)


@pytest.fixture
def unprivileged():
    """A folder that an ordinary user owns, and the test running as that user: root may read everything."""
    folder = Path(tempfile.mkdtemp(prefix="ordinary-user-"))
    user = os.geteuid()
    if user == 0:
        os.chown(folder, 65534, 65534)
        os.setegid(65534)
        os.seteuid(65534)
    yield folder
    if user == 0:
        os.seteuid(0)
        os.setegid(0)
    subprocess.run(["chmod", "-R", "u+rwx", str(folder)], check=False)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_config():
    """tests/tiny.yaml: 32 pixels, two levels, attention at both."""
    from ldm.config.model import load_model_config

    return load_model_config(ROOT / "tests" / "tiny.yaml")


@pytest.fixture
def graph_mode():
    """The mode that training and sampling run in; pynative afterwards, as MindSpore starts."""
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE)
    yield
    ms.set_context(mode=ms.PYNATIVE_MODE)


@pytest.fixture
def tiny_model(tiny_config, graph_mode):
    """The tiny networks with random weights, frozen."""
    from ldm.models.stable_diffusion import build_model

    return build_model(tiny_config)
