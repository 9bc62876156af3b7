"""The components of an engine, and how to make them from settings."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from npu_proxy.batch import Encoding
from npu_proxy.devices.base import Device
from npu_proxy.engine.golden import GoldenBatches
from npu_proxy.engine.tokenize import RequestTokenizer
from npu_proxy.errors import model_errors
from npu_proxy.models.resolve import resolve
from npu_proxy.settings import Settings
from npu_proxy.spec import ModelSpec

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EngineComponents:
    """The components of an engine. ``load_components`` makes them from settings; tests make their own.

    canaries: golden texts for the free room of batches; None leaves them out.
    """

    spec: ModelSpec
    tokenizer: RequestTokenizer
    device: Device
    canaries: Sequence[Encoding] | None = None


def load_components(settings: Settings, stopping: threading.Event) -> EngineComponents:
    """Load the model and its tokenizer, and compile the model. Does not use the network.

    stopping: ends the wait for a device. Raises ModelError, ModelNotFoundError, DeviceError, and UnavailableError if no device
    can serve.
    """
    from npu_proxy.devices.chain import open_devices  # imported here because it loads OpenVINO

    settings, spec = resolve(settings)
    if spec.refused:
        _log.warning("%s is served from its own graph file with padding (device %s): %s", spec.name, settings.device, spec.refused)
    with model_errors(spec.name):
        tokenizer = RequestTokenizer(spec, sanitize=settings.sanitize, on_empty=settings.on_empty)
        golden = GoldenBatches(tokenizer, spec)
        device = open_devices(settings, spec, golden, stopping)
    canaries = golden.canaries if settings.canaries else None
    return EngineComponents(spec=spec, tokenizer=tokenizer, device=device, canaries=canaries)
