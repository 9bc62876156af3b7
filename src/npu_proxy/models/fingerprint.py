"""A short stable name for "these vectors": vectors of two fingerprints must never be mixed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from npu_proxy.types import Kind, ModelSpec

MANIFEST = ".manifest.json"
"""The store's list of a model's files; models/store.py writes it."""

_SCHEME = 1
"""Raise it when the arithmetic changes by more than rounding."""


def fingerprint(spec: ModelSpec, *, precision: str = "fp32") -> str:
    """16 hexadecimal digits over weights, tokenizer, config, pooling, Dense modules, prompts, limit and precision.

    Not part of it: the model's name and where it lies.
    """
    digest = hashlib.sha256()
    for file in [*spec.weight_files, spec.tokenizer_file]:
        digest.update((_recorded_sha256(file, spec.folder) or file_sha256(file)).encode())
    for module in spec.dense:
        digest.update(module.weight.tobytes())
        digest.update(b"" if module.bias is None else module.bias.tobytes())
        digest.update(module.activation.encode())
    meaning = {
        "scheme": _SCHEME,
        "config": {key: value for key, value in spec.config.items() if not key.startswith("_")},
        "pooling": spec.pooling,
        "max_length": spec.max_length,
        "lower_case": spec.lower_case,
        "prompts": dict(spec.prompts),
        "default_prompt": spec.default_prompt,
        "precision": precision,
        # Only what is not as it is for most models, whose fingerprints stay what they were.
        **{key: value for key, value in _special(spec).items() if value},
    }
    digest.update(json.dumps(meaning, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _special(spec: ModelSpec) -> dict[str, object]:
    sides = spec.sides
    return {
        "kind": "" if spec.kind is Kind.DENSE else spec.kind,
        "prompt_left_out": not spec.include_prompt,
        "types": spec.types,
        "plain_tokens": not spec.special_tokens,
        "sides": sides
        and [sides.query_length, sides.document_length, sides.expanded, sides.attend, sorted(sides.skip), sorted(sides.query_skip)],
    }


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal; read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _recorded_sha256(file: Path, folder: Path) -> str | None:
    """What the store's manifest recorded of a file when it verified it, so that a start does not read every weight."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        entry = files[file.relative_to(folder).as_posix()]
        return str(entry["sha256"]) if entry["size"] == file.stat().st_size else None
    except (OSError, ValueError, KeyError):
        return None
