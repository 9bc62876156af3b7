"""The public surface, the direction of imports, and that the documents name what exists."""

import ast
import re
from pathlib import Path

import npu_proxy
from npu_proxy import errors

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "npu_proxy"
LAYERS = {
    "cli": 5,
    "server": 5,
    "prepare": 5,
    "bulk": 5,
    "engine": 4,
    "cache": 2,
    "settings": 3,
    "devices": 3,
    "models": 2,
    "graph": 1,
    "types": 0,
    "errors": 0,
}


def test_exported_members() -> None:
    assert sorted(npu_proxy.__all__) == npu_proxy.__all__
    assert all(hasattr(npu_proxy, name) for name in npu_proxy.__all__)
    raised = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert raised <= set(npu_proxy.__all__)


def test_imports_point_one_way() -> None:
    for file in SOURCE.rglob("*.py"):
        own = file.relative_to(SOURCE).parts[0].removesuffix(".py")
        if own not in LAYERS:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("npu_proxy."):
                other = (node.module or "").split(".")[1]
                assert LAYERS.get(other, 0) <= LAYERS[own], f"{file.name} imports {node.module}"


def test_every_file_is_in_the_architecture() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text()
    named = set(re.findall(r"[a-z_0-9]+\.py", page))
    files = {file.name for file in SOURCE.rglob("*.py")} - {"__init__.py", "__main__.py", "version.py"}
    assert files <= named, f"not in ARCHITECTURE.md: {sorted(files - named)}"
    assert named <= files | {"make.py", "worker.py"}, f"gone, but in ARCHITECTURE.md: {sorted(named - files)}"
