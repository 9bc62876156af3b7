"""The special tokens that a post-processor of tokenizer.json puts around texts, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Part = Mapping[str, Any]
"""A part of tokenizer.json."""
Template = tuple[Sequence["Piece"], Sequence["Piece"]]
"""What surrounds a text, and a pair: special tokens and texts with their types."""
Piece = tuple[str | int, int]
"""A text ("A" or "B") or the id of a special token, and its type."""


def template_of(part: Part | None) -> Template | None:
    """The special tokens that a post-processor puts around a text and a pair; None if it puts none. Raises KeyError and others."""
    if part is None:
        return None
    kind = part["type"]
    if kind == "Sequence":
        found = [template for template in map(template_of, part["processors"]) if template is not None]
        return found[-1] if found else None
    if kind == "ByteLevel":
        return None
    if kind in ("BertProcessing", "RobertaProcessing"):
        first, last, bert = (part["cls"][1], 0), (part["sep"][1], 0), kind == "BertProcessing"
        second = 1 if bert else 0
        between = [last] if bert else [last, last]
        return [first, ("A", 0), last], [first, ("A", 0), *between, ("B", second), (last[0], second)]
    ids = {name: token["ids"] for name, token in part["special_tokens"].items()}
    single, pair = ([piece for entry in part[name] for piece in _pieces(entry, ids)] for name in ("single", "pair"))
    return single, pair


def _pieces(entry: Part, ids: Mapping[str, Sequence[int]]) -> Sequence[Piece]:
    if "Sequence" in entry:
        return [(entry["Sequence"]["id"], entry["Sequence"]["type_id"])]
    token = entry["SpecialToken"]
    return [(number, token["type_id"]) for number in ids[token["id"]]]


def post_processor(template: Template, names: Mapping[int, str]) -> Part:
    """The post-processor that puts these special tokens around texts. names: of the special tokens, by id."""
    single, pair = ([_entry(piece, names) for piece in pieces] for pieces in template)
    ids = sorted({piece[0] for pieces in template for piece in pieces if isinstance(piece[0], int)})
    special = {names[number]: {"id": names[number], "ids": [number], "tokens": [names[number]]} for number in ids}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def _entry(piece: Piece, names: Mapping[int, str]) -> Part:
    what, kind = piece
    if isinstance(what, str):
        return {"Sequence": {"id": what, "type_id": kind}}
    return {"SpecialToken": {"id": names[what], "type_id": kind}}
