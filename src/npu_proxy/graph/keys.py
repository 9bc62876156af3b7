"""What a model family reads of config.json, as a table of keys.

A key is a function that reads a value under its names, with transformers' default, and refuses what the family does not compute.
The reader (models/layout.py) refuses whatever no key has read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from npu_proxy.errors import ModelError
from npu_proxy.graph.activations import ACTIVATIONS

Stored = Mapping[str, Any]
"""The content of config.json, or of an object in it."""
Key = Callable[[Stored], Any]
"""Reads a value from config.json. Raises ModelError naming the key."""
Keys = Mapping[str, Key]
"""The keys of a family, by the names that its code uses."""

REQUIRED: Any = object()
"""The default of a key that has none."""
LARGEST = 1 << 24
"""Largest size in a configuration; vocabularies have up to about a million entries."""


def read_keys(keys: Keys, stored: Stored) -> dict[str, Any]:
    """The values of all keys. Raises ModelError."""
    return {name: key(stored) for name, key in keys.items()}


def value_error(name: str, value: object, expected: str) -> ModelError:
    """The error for a value that is not computed. expected: what is."""
    return ModelError(f"config.json: `{name}` is `{json.dumps(value, default=str)[:60]}`; npu-proxy computes {expected}")


def _key(names: tuple[str, ...], default: Any, check: Callable[[Any], bool], expected: str) -> Key:
    def read(stored: Stored) -> Any:
        found = {name: stored[name] for name in names if stored.get(name) is not None}
        if not found:
            if default is REQUIRED:
                raise ModelError(f"config.json: `{names[0]}` is missing")
            return default
        if len(set(map(repr, found.values()))) > 1:
            raise ModelError(
                f"config.json: {' and '.join(f'`{name}` {value}' for name, value in found.items())} contradict each other"
            )
        for name, value in found.items():
            if not check(value):
                raise value_error(name, value, expected)
        return next(iter(found.values()))

    return read


def size(*names: str, default: Any = REQUIRED) -> Key:
    """A whole number of at least 1."""
    return _key(names, default, lambda value: type(value) is int and 1 <= value <= LARGEST, f"a number from 1 to {LARGEST}")


def heads_of(hidden: str, *names: str) -> Key:
    """A number of attention heads, by which the width of ``hidden`` can be divided."""

    def read(stored: Stored) -> Any:
        heads, width = size(*names)(stored), stored.get(hidden)
        if isinstance(width, int) and width % heads:
            raise value_error(names[0], heads, f"numbers by which `{hidden}`, {width}, can be divided")
        return heads

    return read


def count(*names: str, default: Any = REQUIRED) -> Key:
    """A whole number of at least 0."""
    return _key(names, default, lambda value: type(value) is int and 0 <= value <= LARGEST, f"a number from 0 to {LARGEST}")


def model_sizes() -> dict[str, Key]:
    """The sizes of a model, under the names that most families have."""
    return {
        "vocab_size": size("vocab_size"),
        "hidden_size": size("hidden_size"),
        "num_hidden_layers": size("num_hidden_layers"),
        "num_attention_heads": heads_of("hidden_size", "num_attention_heads"),
        "intermediate_size": size("intermediate_size"),
        "max_position_embeddings": size("max_position_embeddings"),
    }


def real(*names: str, default: Any = REQUIRED) -> Key:
    """A finite number of at least 0."""
    return _key(names, default, _is_number, "a number of at least 0")


def flag(*names: str, default: bool) -> Key:
    """True or false."""
    return _key(names, default, lambda value: isinstance(value, bool), "true or false")


def one_of(*names: str, values: tuple[Any, ...], default: Any) -> Key:
    """One of a few values."""
    return _key(names, default, lambda value: _is_one_of(value, values), "only " + " or ".join(map(json.dumps, values)))


def only(name: str, value: Any, *others: Any) -> Key:
    """A value that must be the default, or one of a few ``others`` that mean the same."""
    return one_of(name, values=(value, *others), default=value)


def absent(name: str) -> Key:
    """A key that must be missing or null."""
    return _key((name,), None, lambda _: False, "no such value")


def activation(*names: str, default: str = "gelu") -> Key:
    """The name of an activation."""
    return _key(names, default, lambda value: isinstance(value, str) and value in ACTIVATIONS, f"only {', '.join(ACTIVATIONS)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    # `True == 1` in Python, but not in a configuration.
    return any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in values)
