"""What a model's card says: its licence, its limits, and where to read it. The card in the folder comes before the catalog."""

from __future__ import annotations

from npu_proxy.models.catalog import find
from npu_proxy.spec import ModelSpec

_HEAD = 20_000
"""Characters of a card that are read; its header is at the start."""
_HUB = "https://huggingface.co"


def licence(spec: ModelSpec) -> str:
    """The licence in the card's header or in the catalog; "see LICENSE" if there is only a licence file, otherwise "unknown"."""
    card = spec.folder / "README.md"
    if card.is_file():
        head = card.read_text(encoding="utf-8", errors="replace")[:_HEAD]
        if head.startswith("---"):
            for line in head.split("---", 2)[1].splitlines():
                key, _, value = line.partition(":")
                if key.strip() == "license" and value.strip():
                    return value.strip()
    entry = find(spec.name)
    if entry is not None and entry.licence:
        return entry.licence
    return "see LICENSE" if any(spec.folder.glob("LICENSE*")) else "unknown"


def limits(spec: ModelSpec) -> str:
    """What the card says the model is not for; "" if that is unknown."""
    entry = find(spec.name)
    return entry.limits if entry is not None else ""


def address(spec: ModelSpec) -> str:
    """Where the card is; "" for a model that is not in the catalog."""
    entry = find(spec.name)
    return f"{_HUB}/{entry.name}" if entry is not None else ""
