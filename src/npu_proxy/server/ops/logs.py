"""Log lines as text or JSON, and the access log. Input texts are never logged, only their number and length."""

from __future__ import annotations

import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any

import msgspec

from npu_proxy.server.apis.common import header_text
from npu_proxy.server.http.exchange import Exchange
from npu_proxy.settings import Settings

_access = logging.getLogger("npu_proxy.access")


def configure(settings: Settings) -> None:
    """Log to standard error in the format and from the level given in the settings."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else text)
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    _access.setLevel(logging.INFO if settings.access_log else logging.CRITICAL)
    for noisy in ("httpx", "httpcore", "urllib3", "filelock", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class JsonFormatter(logging.Formatter):
    """Formats records as one JSON object per line: time, level, logger, message, and the fields of an access line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = "".join(traceback.format_exception(*record.exc_info))
        return msgspec.json.encode(line).decode()


def log_access(exchange: Exchange, status: int, seconds: float) -> None:
    """Write a line to the access log if it is enabled."""
    if not _access.isEnabledFor(logging.INFO):
        return
    request, result, error = exchange.request, exchange.result, exchange.error
    fields: dict[str, Any] = {
        "request_id": exchange.id,
        "method": request.method,
        "path": header_text(request.url.path)[:200],
        "status": status,
        "seconds": round(seconds, 6),
        "client": request.client.host if request.client else None,
        "model": exchange.model,
    }
    if result is not None:
        fields |= {"texts": exchange.texts, "tokens": exchange.tokens, "cached": result.cached, "device": result.device}
        fields |= {"queued": round(result.timings.queued, 6), "inference": round(result.timings.infer, 6)}
    if exchange.key is not None:
        fields["key"] = exchange.key.name
    if error is not None:
        fields["error"] = error.kind
    words = " ".join(f"{name}={_quoted(value)}" for name, value in fields.items() if value not in (None, ""))
    _access.info(words if not _as_json() else f"{fields['method']} {fields['path']} {status}", extra={"fields": fields})


def _quoted(value: object) -> str:
    """Return a value as text, quoted if it could be mistaken for further fields."""
    text = str(value)
    return msgspec.json.encode(text).decode() if set(text) & set(' "=') else text


def _as_json() -> bool:
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)
