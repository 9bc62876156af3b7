"""mteb's STSBenchmark through npu_proxy.bulk.mteb, on local data (no hub): prints the task's main score, x100.

Run it where both are installed: pip install npu-proxy mteb. The figure must be that of bench/quality.py (82.03 by default).
"""

import argparse
import csv
from pathlib import Path

import mteb
from datasets import Dataset, DatasetDict

from npu_proxy import Engine
from npu_proxy.bulk.mteb import MtebEncoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--model", default=None)
    arguments = parser.parse_args()
    file = next((arguments.data / "stsb").glob("*test*"))
    rows = [line for line in csv.reader(file.open(encoding="utf-8"), delimiter="\t", quoting=csv.QUOTE_NONE) if len(line) >= 7]
    test = {"sentence1": [row[5] for row in rows], "sentence2": [row[6] for row in rows], "score": [float(row[4]) for row in rows]}
    task = mteb.get_task("STSBenchmark")
    task.dataset = DatasetDict({"test": Dataset.from_dict(test)})
    task.data_loaded = True
    with Engine(arguments.model) as engine:
        result = mteb.evaluate(MtebEncoder(engine), tasks=[task], cache=None)
    print(f"STSBenchmark, {len(rows)} pairs: {100 * result.task_results[0].get_score():.2f}")


if __name__ == "__main__":
    main()
