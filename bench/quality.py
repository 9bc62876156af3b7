"""Quality of the served vectors on public sets, by well-kept scorers: Spearman of scipy, nDCG@10 of ir-measures.

    make quality

STS-B test: Spearman of cosine against the human scores, x100 (published for all-MiniLM-L6-v2: 82.03).
SciFact test: nDCG@10, documents as `title + " " + text`, every document scored (about 64.5); then the first fifty of each
query in the order of examples/models/scifact-reranker.
Banking77: accuracy of examples/models/banking77-classifier on the ten queries per class that bench/banking.py holds out.
"""

import argparse
import csv
import json
from pathlib import Path

import ir_measures
import numpy as np
from scipy.stats import spearmanr

from banking import banking
from npu_proxy import Engine, Settings

EXAMPLES = Path(__file__).parents[1] / "examples" / "models"
RERANKED = 50
"""Documents per query that the cross-encoder reads."""


def sts(engine: Engine, folder: Path) -> float:
    with (folder / "sts-test.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    left, right = (engine.embed([row[column] for row in rows]) for column in (5, 6))
    found = spearmanr((left * right).sum(1), [float(row[4]) for row in rows])
    return 100 * float(found.statistic)  # pyright: ignore[reportAttributeAccessIssue] - scipy has no types


def scifact(engine: Engine, ranker: Engine, folder: Path) -> tuple[float, float]:
    """nDCG@10 of the vectors, and of their fifty best documents in the cross-encoder's order."""
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
    best = np.argsort(-scores, axis=1)[:, :100]
    first = [
        ir_measures.ScoredDoc(query, documents[index]["_id"], float(scores[number, index]))
        for number, query in enumerate(wanted)
        for index in best[number]
    ]
    second = [
        ir_measures.ScoredDoc(query, documents[best[number][result.index]]["_id"], result.score)
        for number, query in enumerate(wanted)
        for result in ranker.rerank(queries[query], [texts[index] for index in best[number, :RERANKED]], raw=True)
    ]
    relevant = [ir_measures.Qrel(*judgement) for judgement in judged]
    found = [ir_measures.calc_aggregate([ir_measures.nDCG @ 10], relevant, run) for run in (first, second)]
    return 100 * float(found[0][ir_measures.nDCG @ 10]), 100 * float(found[1][ir_measures.nDCG @ 10])


def labelled(engine: Engine, folder: Path) -> tuple[float, int]:
    """Accuracy on the held-out queries, in percent, and how many they are."""
    _, held = banking(folder)
    found = engine.classify([text for text, _ in held])
    return 100 * sum(labels[0].label == name for labels, (_, name) in zip(found, held, strict=True)) / len(held), len(held)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=Path, required=True, help="folder with stsb/ and scifact/")
    data: Path = arguments.parse_args().data
    with Engine(settings=Settings(precision="fp32")) as engine:
        print(f"model {engine.spec.name}, fingerprint {engine.spec.fingerprint}, on {engine.device.name}")
        print(f"STS-B test, Spearman x100:  {sts(engine, data / 'stsb'):.2f}  (published 82.03)", flush=True)
        with Engine(EXAMPLES / "scifact-reranker") as ranker:
            first, second = scifact(engine, ranker, data / "scifact")
        print(f"SciFact test, nDCG@10 x100: {first:.2f}  (published about 64.5)")
        print(f"... {RERANKED} best reranked:       {second:.2f}  (scifact-reranker)", flush=True)
    with Engine(EXAMPLES / "banking77-classifier") as classifier:
        accuracy, count = labelled(classifier, data / "banking77")
        print(f"Banking77, accuracy:        {accuracy:.2f} % of {count} held out  (banking77-classifier)")


if __name__ == "__main__":
    main()
