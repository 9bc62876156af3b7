"""Folders with one odd thing each, as people have them, against the reference libraries (tests/golden/make_odd.py)."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import GOLDEN
from npu_proxy import Engine, Settings
from npu_proxy.batch import NATIVE_STYLE, GraphShape
from npu_proxy.graph.build import build, tensor_name
from npu_proxy.models.layout import read_spec
from npu_proxy.models.weights import Tensors
from npu_proxy.prepare.compare import Comparison, agrees, compare
from npu_proxy.types import OutputType, Pair, TextInput

ODD = GOLDEN / "odd"
NAMES = sorted(folder.name for folder in ODD.iterdir() if folder.is_dir())
TEXTS = json.loads((ODD / "texts.json").read_text(encoding="utf-8"))
WAYS = {
    "packed": Settings(device="cpu"),
    "padded": Settings(device="cpu", packing=False),
    "npu-sim": Settings(device="npu-sim", fallback=False, compile_cache_mb=0),
}


def compared(folder: Path, settings: Settings, side: str) -> list[Comparison]:
    stored = np.load(folder / "answers.npz")
    prefix = "query" if side == "query" else ""
    answers: list[np.ndarray | Exception] = [stored[f"{prefix}{index}"] for index in range(len(TEXTS))]
    with Engine(folder, settings=replace(settings, on_empty="embed", cache_mb=0)) as engine:
        texts: list[TextInput] = [Pair("the cat", text) if engine.spec.output_type is OutputType.SCORES else text for text in TEXTS]
        return compare(engine, lambda _: answers, texts, side=side)


def is_empty_query(one: Comparison, side: str) -> bool:
    """Whether a query is refused because nothing is left of it: without special tokens, it may have none."""
    return side == "query" and "no tokens" in one.error


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_an_odd_folder_gives_what_its_own_library_computes(name: str, way: str, tmp_path: Path) -> None:
    if name.startswith("static") and way == "npu-sim":
        pytest.skip("the texts of a static model have no limit, and shapes of an NPU do")
    spec = read_spec(ODD / name)
    for side in ("document", "query") if spec.has_sides else ("document",):
        found = compared(ODD / name, replace(WAYS[way], compile_cache=tmp_path, store=tmp_path), side)
        assert [one for one in found if not agrees(one, spec)] == []
        assert [one for one in found if one.refused and not is_empty_query(one, side)] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_an_odd_folder_is_read(name: str) -> None:
    spec = read_spec(ODD / name)
    build(spec, Tensors(spec.weight_files, tensor_name(spec.family)), GraphShape(), NATIVE_STYLE)
