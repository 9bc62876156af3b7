"""Files prepared for a model outside its folder: int8 copies, compiled blobs, tuning profiles."""

from __future__ import annotations

from pathlib import Path

from npu_proxy.errors import ModelError
from npu_proxy.models.quantized import int8_reports, remove_int8
from npu_proxy.models.resolve import read_folder
from npu_proxy.models.tuning import remove_profile
from npu_proxy.settings import Settings


def remove_artifacts(settings: Settings, folder: Path) -> None:
    """Remove the files prepared for the model in ``folder``; do nothing if the model cannot be read."""
    from npu_proxy.devices.worker.blobs import remove_blobs  # loads OpenVINO, whose version is part of the names of blobs

    try:
        fingerprint = read_folder(settings, folder).fingerprint
    except ModelError:
        return
    for prepared in (fingerprint, *(report.fingerprint for report in int8_reports(settings.store, fingerprint))):
        remove_blobs(settings.store, prepared)
    remove_int8(settings.store, fingerprint)
    remove_profile(settings.store, fingerprint)
