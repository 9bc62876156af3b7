"""Settings check themselves wherever they are made: words, types, and bounds on both sides of every number."""

import math
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest

from npu_proxy import Settings, SettingsError
from npu_proxy.settings import types_of_settings
from npu_proxy.types import Pooling

HINTS = types_of_settings()
ALL = {setting.name: setting for setting in fields(Settings)}


def made(**given: Any) -> Settings:
    """Settings of values that no type checker looks at."""
    return Settings(**given)


def kind_of(name: str) -> Any:
    hint = HINTS[name]
    return next((kind for kind in get_args(hint) if kind is not type(None)), hint) if "|" in str(hint) else hint


NUMBERS = [name for name in ALL if kind_of(name) in (int, float)]
WORDS = [name for name in ALL if get_origin(kind_of(name)) is Literal]


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_bounds_on_both_sides(name: str) -> None:
    least, most = ALL[name].metadata["least"], ALL[name].metadata["most"]
    assert least is not None
    assert most is not None
    whole = kind_of(name) is int
    for wrong in (least - 1, most + 1 if whole else most * 1.01, math.nan, math.inf, -math.inf, 10**30, "5", [5], True):
        if wrong == 0 and "None" in str(HINTS[name]):
            continue  # 0 is automatic
        with pytest.raises(SettingsError, match=f"`{name}`") as error:
            made(**{name: wrong})
        assert error.value.param == name
    for right in (least, most):
        assert getattr(made(**{name: int(right) if whole else right}), name) == right


@pytest.mark.parametrize("name", WORDS)
def test_every_word_is_one_of_its_choices(name: str) -> None:
    choices = get_args(kind_of(name))
    for choice in choices:
        assert getattr(made(**{name: choice, "device": "cpu"}), name) == choice
    for wrong in ("banana", "", 5, None, choices[0].upper()):
        with pytest.raises(SettingsError, match=f"`{name}`"):
            made(**{name: wrong})


@pytest.mark.parametrize("name", [name for name in ALL if kind_of(name) is bool])
def test_every_switch_is_true_or_false(name: str) -> None:
    for right, value in ((True, True), (False, False), ("on", True), ("off", False)):
        assert getattr(made(**{name: right}), name) is value
    for wrong in ("banana", "true", 1, None, []):
        with pytest.raises(SettingsError, match=f"`{name}`"):
            made(**{name: wrong})


def test_numbers_of_numpy_are_numbers() -> None:
    assert made(port=np.int64(5), timeout=np.float32(2.5)).port == 5
    for wrong in ({"port": np.int64(-5)}, {"timeout": np.float32("nan")}):
        with pytest.raises(SettingsError):
            made(**wrong)


def test_paths_lists_and_poolings_are_converted() -> None:
    settings = made(store="x", model="a", served_model_name=["b", "c"], pooling="cls", uds=None)
    assert (settings.store, settings.model, settings.served_model_name) == (Path("x"), ("a",), ("b", "c"))
    assert settings.pooling is Pooling.CLS
    for wrong in (
        {"store": 5},
        {"model": 5},
        {"pooling": "none-such"},
        {"host": 5},
        {"model": ()},
        {"api_key": [None]},
        {"model": [5]},
    ):
        with pytest.raises(SettingsError, match=f"`{next(iter(wrong))}`"):
            made(**wrong)


def test_settings_in_place_of_a_model_are_a_short_error() -> None:
    from npu_proxy import Engine

    with pytest.raises(SettingsError, match=r"^`model` is Settings.*it must be a list of words$") as error:
        Engine(Settings(model="a"))  # type: ignore[arg-type]
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("flag", "value"), [("--precision", "banana"), ("--port", "99999"), ("--port", "-1"), ("--hint", "fast"), ("--timeout", "0")]
)
def test_the_command_line_says_the_same(flag: str, value: str) -> None:
    name = flag.strip("-")
    with pytest.raises(SettingsError) as error:
        made(**{name: float(value) if name == "timeout" else int(value) if name == "port" else value})
    run = subprocess.run([sys.executable, "-m", "npu_proxy", "serve", flag, value], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    words = str(error.value).replace("`", "")
    assert words.split(name)[1].split(".0")[0].strip(" .") in run.stderr


def test_far_more_streams_than_threads_are_refused_before_anything_is_compiled() -> None:
    from conftest import GOLDEN
    from npu_proxy import Engine

    with pytest.raises(SettingsError, match="`streams` is 1000, but there are 2 CPU threads"):
        Engine(GOLDEN / "mean", settings=Settings(device="cpu", threads=2, streams=1000)).start()
