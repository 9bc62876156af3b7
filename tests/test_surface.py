"""The public names, the direction of imports, and that the documents name what exists."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import npu_proxy
from npu_proxy import errors

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "npu_proxy"
ORDER = (
    ("errors", "version", "quiet"),
    ("system",),
    ("types",),
    ("batch",),
    ("spec", "targets"),
    ("settings", "graph"),
    ("models", "cache"),
    ("devices",),
    ("engine",),
    ("bulk",),
    ("prepare",),
    ("server",),
    ("ray", "compat"),
    ("commands",),
)
"""The files and folders of the package, lowest first. Each imports only from rows above it."""
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}


def modules() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in SOURCE.rglob("*.py"):
        parts = file.relative_to(SOURCE.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = file
    return found


def imports(file: Path, known: dict[str, Path]) -> set[str]:
    """The modules of this package that a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "npu_proxy":
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (members & known.keys()) or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "npu_proxy"}
    return found


def test_exported_members() -> None:
    assert sorted(npu_proxy.__all__) == npu_proxy.__all__
    assert all(hasattr(npu_proxy, name) for name in npu_proxy.__all__)
    raised = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert raised <= set(npu_proxy.__all__)


def test_every_error_is_public_or_in_a_file_that_errors_py_names() -> None:
    known = {name for name, value in vars(errors).items() if isinstance(value, type)}
    for name, file in modules().items():
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and known & {base.id for base in node.bases if isinstance(base, ast.Name)}:
                place = str(file.relative_to(SOURCE))
                assert name == "npu_proxy.errors" or place in (errors.__doc__ or ""), f"{node.name} of {place}"


def test_no_module_imports_itself_through_others() -> None:
    known = modules()
    list(TopologicalSorter({name: imports(file, known) for name, file in known.items()}).static_order())


def test_imports_point_one_way() -> None:
    known = modules()
    for name, file in known.items():
        own = name.split(".")[1:2]
        for other in imports(file, known):
            target = other.split(".")[1:2]
            if own and target and own != target and own[0] in RANK:
                assert RANK[target[0]] < RANK[own[0]], f"{name} imports {other}"


def test_every_file_and_folder_has_a_rank() -> None:
    here = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert here - {"__init__", "__main__"} == set(RANK)


@pytest.mark.parametrize("module", ["npu_proxy", "npu_proxy.models.resolve", "npu_proxy.commands.app"])
def test_imports_load_no_openvino(module: str) -> None:
    code = f"import sys, {module}; print('openvino' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.strip() == "False"


def test_every_file_is_in_the_architecture() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text()
    named = set(re.findall(r"[a-z_0-9]+\.py", page))
    files = {file.name for file in SOURCE.rglob("*.py")} - {"__init__.py", "__main__.py", "version.py"}
    assert files <= named, f"not in ARCHITECTURE.md: {sorted(files - named)}"
    assert named <= files | {"make.py"}, f"gone, but in ARCHITECTURE.md: {sorted(named - files)}"


def test_openvino_does_not_report_to_its_maker_or_fork() -> None:
    """Its telemetry forks a process when it is imported, which may never end."""
    code = (
        "import os, sys, multiprocessing\n"
        "os.register_at_fork(before=lambda: os._exit(9))\n"
        "import npu_proxy.devices.chain, time\n"
        "from npu_proxy.devices.openvino import warm_bindings\n"
        "warm_bindings(); time.sleep(1)\n"
        "assert 'openvino' in sys.modules\n"
        "assert not any(name.startswith('openvino_telemetry.') for name in sys.modules)\n"
        "assert not multiprocessing.active_children()\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
