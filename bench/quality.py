"""Quality of the served vectors on public sets, by well-kept scorers: Spearman of scipy, nDCG@10 of ir-measures.

    make quality

STS-B test: Spearman of cosine against the human scores, x100 (published for all-MiniLM-L6-v2: 82.03).
SciFact test: nDCG@10, documents as `title + " " + text`, every document scored (about 64.5).
"""

import argparse
import csv
import json
from pathlib import Path

import ir_measures
import numpy as np
from scipy.stats import spearmanr

from npu_proxy import Engine, Settings


def sts(engine: Engine, folder: Path) -> float:
    with (folder / "sts-test.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    one, other = (engine.embed([row[column] for row in rows]) for column in (5, 6))
    return 100 * float(spearmanr((one * other).sum(1), [float(row[4]) for row in rows]).statistic)


def scifact(engine: Engine, folder: Path) -> float:
    documents = [json.loads(line) for line in (folder / "corpus.jsonl").read_text(encoding="utf-8").split("\n") if line]
    queries = {
        row["_id"]: row["text"] for line in (folder / "queries.jsonl").read_text().split("\n") if line for row in [json.loads(line)]
    }
    with (folder / "qrels" / "test.tsv").open(newline="") as file:
        judged = [(row["query-id"], row["corpus-id"], int(row["score"])) for row in csv.DictReader(file, delimiter="\t")]
    wanted = list(dict.fromkeys(query for query, _, _ in judged))
    texts = [document["title"] + " " + document["text"] for document in documents]
    vectors = np.stack(list(engine.stream(texts, input_type="document")))
    scores = engine.embed([queries[query] for query in wanted], input_type="query") @ vectors.T
    run = [
        ir_measures.ScoredDoc(query, documents[index]["_id"], float(scores[number, index]))
        for number, query in enumerate(wanted)
        for index in np.argsort(-scores[number])[:100]
    ]
    found = ir_measures.calc_aggregate([ir_measures.nDCG @ 10], [ir_measures.Qrel(*one) for one in judged], run)
    return 100 * float(found[ir_measures.nDCG @ 10])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=Path, required=True, help="folder with stsb/ and scifact/")
    data: Path = arguments.parse_args().data
    with Engine(settings=Settings(precision="fp32")) as engine:
        print(f"model {engine.spec.name}, fingerprint {engine.spec.fingerprint}, on {engine.device.name}")
        print(f"STS-B test, Spearman x100:  {sts(engine, data / 'stsb'):.2f}  (published 82.03)", flush=True)
        print(f"SciFact test, nDCG@10 x100: {scifact(engine, data / 'scifact'):.2f}  (published about 64.5)")


if __name__ == "__main__":
    main()
