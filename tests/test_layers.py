"""The packages of ldm/ import only what is below them, so that each can be read without the ones above it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

# From the bottom to the top. Packages of one layer may import each other as long as there is no cycle.
LAYERS = (
    {"errors"},
    {"files"},
    {"runtime", "settings"},
    {"ops"},
    {"models", "tokenizer"},
    {"data", "diffusion", "weights"},
    {"prompts", "textual_inversion"},
    {"lora"},
    {"generation", "training", "metrics"},
    {"commands"},
)
LAYER = {package: number for number, layer in enumerate(LAYERS) for package in layer}
# The networks have no files, no command line and no LoRA. `settings.model` holds their sizes.
NETWORKS_MAY_IMPORT = {"ldm.ops", "ldm.models", "ldm.settings.model"}


def imported_modules(source: str) -> set[str]:
    """Return the full names of all modules that a file imports, inside functions and under TYPE_CHECKING too."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)
    return modules


def imports_of(*folders: str) -> list[tuple[str, str]]:
    """Return (file, module) for every import of this project's modules in the files of `folders`."""
    return [
        (path.relative_to(ROOT).as_posix(), module)
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
        for module in sorted(imported_modules(path.read_text(encoding="utf-8")))
        if module.split(".")[0] in ("examples", "ldm", "tools", "tests", "text_to_image", "train_text_to_image")
    ]


IMPORTS = imports_of("ldm")


def package_of(name: str) -> str:
    """Return the package of a file (`ldm/lora/merge.py`) or module (`ldm.lora.merge`): "lora"."""
    return Path(name.replace(".py", "").replace(".", "/")).parts[1]


def test_every_package_has_a_layer():
    packages = {
        path.stem for path in (ROOT / "ldm").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert packages - {"__init__"} == set(LAYER)


def test_no_package_imports_one_above_it():
    upward = [
        f"{file} imports {module}"
        for file, module in IMPORTS
        if not module.startswith("ldm.") or LAYER[package_of(module)] > LAYER.get(package_of(file), 0)
    ]
    assert upward == []


@pytest.mark.parametrize(
    "layer", [layer for layer in LAYERS if len(layer) > 1], ids=lambda layer: "-".join(sorted(layer))
)
def test_packages_of_one_layer_do_not_import_each_other_in_a_circle(layer):
    imports = {(package_of(file), package_of(module)) for file, module in IMPORTS if file != "ldm/__init__.py"}
    remaining = set(layer)
    while remaining:
        independent = {a for a in remaining if not any((a, b) in imports for b in remaining - {a})}
        assert independent, f"{sorted(remaining)} import each other"
        remaining -= independent


def test_networks_import_only_operators_and_their_sizes():
    others = [
        f"{file} imports {module}"
        for file, module in IMPORTS
        if file.startswith("ldm/models/")
        and not any(f"{module}.".startswith(f"{name}.") for name in NETWORKS_MAY_IMPORT)
    ]
    assert others == []


def test_tools_and_lessons_import_only_the_library_and_other_tools():
    others = [
        f"{file} imports {module}"
        for file, module in imports_of("tools", "eval", "examples")
        if not module.startswith(("ldm.", "tools."))
        # The benchmark measures the same diffusers networks that the parity tests compare with.
        and not (file == "tools/benchmark/reference.py" and module.startswith("tests.parity.reference."))
    ]
    assert others == []


def test_imports_inside_functions_and_for_type_checking_are_seen():
    source = "if TYPE_CHECKING:\n    from ldm.lora import LoRA\ndef load():\n    import ldm.weights.load\n"
    assert imported_modules(source) == {"ldm.lora.LoRA", "ldm.weights.load"}
