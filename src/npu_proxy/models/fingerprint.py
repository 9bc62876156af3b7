"""Fingerprints: a short, stable hash of all that decides a model's vectors. Vectors of different fingerprints must not be mixed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

from npu_proxy.models.manifest import read_manifest
from npu_proxy.spec import LayerNormModule, ModelSpec, Module, NormalizeModule, SpladeConfig, TruncateModule
from npu_proxy.types import OutputType

_SCHEME = 1
"""Increment this when the arithmetic changes by more than rounding errors."""


def fingerprint(spec: ModelSpec, *, precision: str = "fp32") -> str:
    """A hash of weights, tokenizer, config, pooling, Dense modules, prompts, limit and precision, as 16 hexadecimal digits.

    It does not depend on the model's name and folder.
    """
    digest = hashlib.sha256()
    for file in [*spec.weight_files, *spec.tokenizer.files]:
        digest.update((_recorded_sha256(file, spec.folder) or file_sha256(file)).encode())
    for module in (*spec.token_modules, *spec.modules):
        _add_module(digest, module)
    if spec.query_weights is not None:
        digest.update(spec.query_weights.layer.weight.data)
    properties = {
        "scheme": _SCHEME,
        "config": {key: value for key, value in spec.stored_config.items() if not key.startswith("_")},
        "pooling": spec.pooling,
        "max_length": spec.max_length,
        "lower_case": spec.lower_case,
        "prompts": dict(spec.prompts),
        "default_prompt": spec.default_prompt,
        "precision": precision,
        # Only values that differ from the usual, so that the fingerprints of existing models do not change.
        **{key: value for key, value in _special(spec).items() if value},
    }
    digest.update(json.dumps(properties, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _add_module(digest: Any, module: Module) -> None:
    if isinstance(module, NormalizeModule | TruncateModule):
        digest.update(repr(module).encode())
        return
    digest.update(module.weight.data)
    digest.update(b"" if (bias := module.bias) is None else bias.data)
    if isinstance(module, LayerNormModule):
        digest.update(f"layer norm {module.epsilon}".encode())
        return
    digest.update(module.activation.encode())
    if module.residual:
        digest.update(b"residual" + (module.tensors["residual.weight"].tobytes() if "residual.weight" in module.tensors else b""))


def _special(spec: ModelSpec) -> dict[str, object]:
    sides = spec.late_interaction
    return {
        "kind": "" if spec.output_type is OutputType.DENSE else spec.output_type,
        "prompt_left_out": not spec.include_prompt,
        "types": spec.type_ids,
        "plain_tokens": not spec.special_tokens,
        "splade": [spec.splade.sums, spec.splade.log_twice] if spec.splade != SpladeConfig() else [],
        "template": spec.pair_template and [*astuple(spec.pair_template)],
        "token_modules": len(spec.token_modules),
        "tokenizer_parts": dict(spec.tokenizer.parts),
        "cuts_start": spec.tokenizer.cuts_start,
        "adapter": spec.adapter_scale,
        "queries": spec.query_weights and [spec.query_weights.limit, spec.query_weights.default],
        "dropped": sorted(spec.dropped_ids),
        "characters": spec.most_characters,
        "accepted": sorted(spec.accepted),
        "sides": sides
        and [
            sides.query_length,
            sides.document_length,
            sides.expanded_length,
            sides.attend_to_expansion,
            sorted(sides.skip_ids),
            sorted(sides.query_skip_ids),
        ],
    }


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal; the file is read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _recorded_sha256(file: Path, folder: Path) -> str | None:
    """The SHA-256 of a file in the store's manifest, if any, so that a start does not have to read all weights."""
    manifest = read_manifest(folder)
    if manifest is None or not file.is_relative_to(folder):
        return None
    entry = manifest.files.get(file.relative_to(folder).as_posix())
    return entry.sha256 if entry is not None and entry.size == file.stat().st_size else None
