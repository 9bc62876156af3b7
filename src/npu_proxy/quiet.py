"""Keep the libraries used here from reporting to their makers. Runs before any of them is imported, in every process of ours."""

from __future__ import annotations

import os
import sys

_REPORTERS = ("openvino_telemetry",)
"""Packages that exist only to report. `import openvino` and NNCF send events through this one, from a process that they fork while
other threads run; it can stop for ever in a lock that one of them held, and then outlives its parent, with all its open files."""
_OPT_OUTS = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
"""Variables that tell libraries not to report: ONNX Runtime (which otherwise writes a device id and posts to its maker),
huggingface_hub and transformers, optimum, and by convention many others."""

CODE = f"import sys; sys.modules.update(dict.fromkeys({_REPORTERS!r}))\n"
"""The same as code, for processes that import a library before this package."""


def keep_quiet() -> None:
    """Let the packages that report fail to import, for which their callers have a stub, and set the variables."""
    for name in _REPORTERS:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    for variable, value in _OPT_OUTS.items():
        os.environ.setdefault(variable, value)
