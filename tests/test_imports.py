"""Who may import whom: one direction only, so that the model can be built without ranks and data without DeepSpeed."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "model": {"model"},
    "data": {"data"},
    "parallel": {"parallel", "model"},
    "launcher": {"launcher", "parallel", "model", "data"},
    "cluster": {"cluster", "launcher"},
}
# Packages that have one home; tests may use them too.
HOMES = {
    "deepspeed": {"parallel"},
    "torch.distributed": {"parallel"},
    "transformers": {"model", "data"},
    "sentencepiece": {"data"},
    "datasets": {"data"},
    "peft": {"model"},
    "compressed_tensors": {"model"},
}


# What cluster/ may import of launcher/: it runs on login nodes, where only Python and PyYAML need be.
FOR_CLUSTER = {"launcher.goodput", "launcher.lines"}


def imported_names(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("folder", ALLOWED)
def test_import_direction(folder):
    for path in (ROOT / folder).rglob("*.py"):
        used = {name.split(".")[0] for name in imported_names(path)} & ALLOWED.keys()
        assert used <= ALLOWED[folder], f"{path} imports {sorted(used - ALLOWED[folder])}"


def test_cluster_needs_python_and_yaml_alone():
    for path in (ROOT / "cluster").rglob("*.py"):
        used = {".".join(name.split(".")[:2]) for name in imported_names(path) if name.startswith("launcher")}
        assert used <= FOR_CLUSTER | {"launcher"}, (
            f"{path} imports {sorted(used)}; of launcher/ it may use {FOR_CLUSTER}"
        )
    paths = [*(ROOT / "cluster").rglob("*.py"), *(ROOT / f"{name.replace('.', '/')}.py" for name in FOR_CLUSTER)]
    for path in paths:
        roots = {name.split(".")[0] for name in imported_names(path)} - {"cluster", "launcher", "yaml"}
        assert roots <= sys.stdlib_module_names, f"{path} imports {sorted(roots - sys.stdlib_module_names)}"


@pytest.mark.parametrize("package", HOMES)
def test_each_dependency_has_one_home(package):
    for folder in ALLOWED:
        for path in (ROOT / folder).rglob("*.py"):
            found = any(name == package or name.startswith(f"{package}.") for name in imported_names(path))
            assert not found or folder in HOMES[package], f"{path} imports {package}, whose home is {HOMES[package]}"
