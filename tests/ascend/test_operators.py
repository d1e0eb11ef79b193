"""Every operator of the sampling and training graphs is there on Ascend, as far as MindSpore's documentation says.

No Ascend device is needed: the graphs are compiled at tiny size, and each operator in them is looked up in its
documentation string under "Supported Platforms". What has none is listed in docs/ascend.md with what it comes from.
"""

from __future__ import annotations

import re
from pathlib import Path

import mindspore
import pytest
from mindspore import mint, nn, ops
from mindspore.ops import auto_generate

from tests.conftest import ROOT, dump_graphs, validated_graphs

# How a graph is held together; no kernel stands behind these.
STRUCTURE = {"Depend", "Load", "MakeTuple", "Partial", "Switch", "TupleGetItem", "UpdateState"}
UPDATES = tuple(f"update, {name}" for name in ("adamw", "lion", "adafactor", "adamwschedulefree", "prodigy", "limited"))
LOSSES = tuple(f"loss, {name}" for name in ("l1", "huber", "smooth_l1"))
SAMPLING = ("text", "encode", "decode", "unet", "guided", "sampler")
GRAPHS = (*SAMPLING, "train", "update", *UPDATES, *LOSSES, "kinds of LoRA")
pytestmark = pytest.mark.without_dry_run  # it compiles on the CPU, with the forms of Ascend
PLUGINS = ("libmindspore_ops_ascend.so", "libmindspore_ascend.so.2", "ascend/libmindspore_graph_ir.so")


@pytest.fixture(scope="module")
def operators(tmp_path_factory):
    """Graph -> the names of its operators."""
    folder = tmp_path_factory.mktemp("graphs")
    dump_graphs("tests.ascend_graphs", folder)
    found = {}
    for graph in GRAPHS:
        names = re.findall(r"^\s*%\S+ = (?:PrimFunc_)?(\w+)\(", validated_graphs(folder / graph), re.M)
        found[graph] = set(names) - STRUCTURE
    return found


@pytest.fixture(scope="module")
def listed():
    """Operator -> the operator that it comes from, of the table in docs/ascend.md."""
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", (ROOT / "docs" / "ascend.md").read_text(encoding="utf-8"), re.M)
    assert rows
    return dict(rows)


def platforms(name: str, followed: tuple[str, ...] = ()) -> set[str]:
    """What the documentation string of an operator says under "Supported Platforms"; where it refers to a function
    instead, what that one's says."""
    texts = [getattr(getattr(room, name, None), "__doc__", None) or "" for room in (ops, auto_generate, mint, nn)]
    for text in texts:
        line = re.search(r"Supported Platforms:\s*\n\s*(``.*``)", text)
        if line:
            return set(re.findall(r"``(\w+)``", line.group(1)))
    for text in texts:
        other = re.search(r"[Rr]efer to\s+:(?:func|class):`mindspore\.\w+\.(\w+)`", text)
        if other and other.group(1) not in followed:
            return platforms(other.group(1), (*followed, name))
    return set()


def test_the_graphs_are_what_they_are_taken_for(operators):
    """A change of MindSpore's file format would leave nothing to look up."""
    assert {"Conv2DExt", "Dense", "BatchMatMul", "Softmax", "GroupNorm", "GeluExt"} <= operators["unet"]
    assert {"IndexSelect", "LayerNormExt", "Sigmoid"} <= operators["text"]
    assert {"Conv2DExt", "GroupNorm"} <= operators["encode"] & operators["decode"]
    assert {"ConvolutionGrad", "GroupNormGrad", "Cast", "GreaterEqual"} <= operators["train"]
    assert operators["update"]
    assert "AdamWeightDecay" in operators["update"] & operators["update, adamw"] & operators["update, prodigy"]
    assert "Sign" in operators["update, lion"]
    assert "UnsortedSegmentSum" in operators["update, adafactor"]
    assert "Sqrt" in operators["update, adamwschedulefree"] & operators["loss, huber"] & operators["loss, smooth_l1"]
    assert "MatMul" in operators["update, limited"]
    assert "Sign" in operators["loss, l1"]


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_operator_is_documented_for_ascend_or_listed(operators, listed, graph):
    assert not [name for name in sorted(operators[graph]) if "Ascend" not in platforms(name) and name not in listed]


def test_what_is_listed_is_used_and_comes_from_an_operator_of_ascend(operators, listed):
    used = set().union(*operators.values())
    assert not set(listed) - used, "listed in docs/ascend.md, but in no graph"
    assert not [name for name in listed if "Ascend" in platforms(name)], "listed, but documented by now"
    assert not [origin for origin in listed.values() if "Ascend" not in platforms(origin)]


def test_what_is_listed_is_named_in_mindspores_ascend_libraries(listed):
    folder = Path(mindspore.__file__).parent / "lib" / "plugin"
    libraries = [folder / name for name in PLUGINS if (folder / name).is_file()]
    if not libraries:
        pytest.skip("this MindSpore was built without Ascend")
    contents = [library.read_bytes() for library in libraries]
    # A view has no kernel: the host makes it, of the same memory, on every device.
    kernels = [name for name in listed if not name.endswith("View")]
    assert not [name for name in kernels if not any(name.encode() in content for content in contents)]


@pytest.mark.parametrize("name, there", [("MatMul", True), ("Reshape", True), ("Lgamma", False), ("Nonsense", False)])
def test_looking_up(name, there):
    """Reshape's documentation refers to a function's; Lgamma is for GPU and CPU."""
    assert ("Ascend" in platforms(name)) is there


def test_flash_attention_is_ascends_alone():
    assert platforms("flash_attention_score") == {"Ascend"}


def test_gradients_are_averaged_by_an_operator_of_ascend():
    """The one operator that training on several devices adds."""
    assert {"Ascend", "CPU"} <= platforms("AllReduce")
