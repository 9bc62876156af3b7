"""Results as a JSON file, a table and a plot."""

import json
import statistics
from pathlib import Path

AIMS = {"sentence-transformers": 2.0, "infinity": 2.0, "openvino-genai": 4.2, "fastembed": 4.5}


def write(results: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(results, indent=1) + "\n")
    table = "\n".join(lines(results)) + "\n"
    (folder / "bench.md").write_text(table)
    plot(results, folder / "bench.png")
    print(table)


def series(results: dict, name: str) -> list[float]:
    """Tokens per second of a system in each round."""
    return [results["tokens"] / measured["seconds"][name] for measured in results["rounds"]]


def ratio(results: dict, name: str, of: str = "npu-proxy") -> float:
    """How much faster ``of`` is than ``name``: the median over rounds of the ratio within a round."""
    return statistics.median(measured["seconds"][name] / measured["seconds"][of] for measured in results["rounds"])


def lines(results: dict) -> list[str]:
    rows = [
        f"{results['texts']} texts, {results['tokens']} tokens, {len(results['rounds'])} rounds interleaved, "
        f"{results['threads']} threads; medians. Made by `make bench`.",
        "",
        "| system | tokens/s | npu-proxy is faster by | aim | start to first vector | peak memory | smallest cosine to npu-proxy |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    names = sorted(results["rounds"][0]["seconds"], key=lambda name: -statistics.median(series(results, name)))
    for name in names:
        about = results["systems"].get(name, {})
        cells = [f"{name} {about.get('version', '')}".strip(), f"{statistics.median(series(results, name)):,.0f}"]
        cells += [f"{ratio(results, name):.2f}x", f"{AIMS[name]}x" if name in AIMS else ""]
        cells += (
            [f"{about['start_seconds']:.1f} s", f"{about['peak_mb']:.0f} MB", f"{about['smallest_cosine']:.6f}"]
            if about
            else ["", "", ""]
        )
        rows.append("| " + " | ".join(cells) + " |")
    limit = statistics.median(measured["of_limit"] for measured in results["rounds"])
    best = statistics.median(measured["matrix_product"] for measured in results["rounds"]) / 1e9
    rows += ["", f"Share of the machine's matrix-product limit ({best:.0f} GFLOP/s): {limit:.2f} (aim 0.95)."]
    if "latency" in results:
        rows += [
            "",
            "| server, one short query | idle p50 | idle p99 | under load p50 | under load p99 |",
            "| --- | --- | --- | --- | --- |",
        ]
        for name, found in results["latency"].items():
            values = (found[key] * 1000 for key in ("idle_p50", "idle_p99", "loaded_p50", "loaded_p99"))
            rows.append(f"| {name} | " + " | ".join(f"{value:.0f} ms" for value in values) + " |")
        full_batch = results["row_seconds"]
        allowed = results["latency"]["npu-proxy"]["idle_p50"] + 3 * full_batch
        rows += [
            "",
            f"Allowed under load: idle p50 and three full batches of {full_batch * 1000:.0f} ms, {allowed * 1000:.0f} ms.",
        ]
    rows += [f"Left out: {name}, {why}" for name, why in results["left_out"].items()]
    return rows


def plot(results: dict, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = sorted(results["rounds"][0]["seconds"], key=lambda name: statistics.median(series(results, name)))
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(names) + 1.2), layout="constrained")
    middles = [statistics.median(series(results, name)) for name in names]
    spans = [
        [middle - min(series(results, name)), max(series(results, name)) - middle]
        for name, middle in zip(names, middles, strict=True)
    ]
    colours = ["#0b6bcb" if name.startswith("npu-proxy") else "#9aa5b1" for name in names]
    axes.barh(names, middles, xerr=list(zip(*spans, strict=True)), color=colours, ecolor="#334", capsize=3)
    for name, middle in zip(names, middles, strict=True):
        axes.text(middle * 0.02, name, f"{middle:,.0f}", va="center", color="white", fontweight="bold")
    axes.set_xlabel("tokens/s: median, range over rounds\nall-MiniLM-L6-v2 fp32, real mixed texts, 256-token limit")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
