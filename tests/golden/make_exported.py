"""Makes the golden models of tests/golden/exported: families that are not built here, as `npu-proxy convert` writes them.

Run it by ``make golden``, after the others. The answers are those of the reference libraries.
"""

import shutil
from pathlib import Path

from make_families import dense, scores, start

from npu_proxy import Settings
from npu_proxy.prepare.convert import convert


def exported(name: str, source: Path) -> None:
    """Convert a golden model and keep the graph in its place."""
    target = start(f"exported/{name}")
    target.parent.mkdir(exist_ok=True)
    _, least = convert(Settings(model=(str(source),)), target, trust=False, say=print)
    shutil.copy(source / "answers.npz", target)  # texts.json went with it
    shutil.rmtree(source)
    print(name, least, sum(file.stat().st_size for file in target.rglob("*") if file.is_file()) // 1000, "KB")


if __name__ == "__main__":
    exported("t5_mean", dense("t5", "t5", "mean", 90, outputs=(48,), plain=False))
    scores("electra", "electra", 1, 91)
    exported("electra_rerank", Path(__file__).parent / "electra")
