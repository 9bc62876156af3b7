"""What fewer dimensions cost: STS-B (Spearman x 100) and SciFact (nDCG@10 x 100) with vectors cut and normalized again.

python bench/dimensions.py [--model MODEL]
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np

from npu_proxy import Engine
from npu_proxy.engine.similarity import normalize

DATA = Path(__file__).parents[2] / "shared" / "data"


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share their mean."""
    order = np.argsort(values, kind="stable")
    places = np.empty(len(values))
    places[order] = np.arange(len(values))
    sums, counts = np.zeros(len(values)), np.zeros(len(values))
    _, group = np.unique(values, return_inverse=True)
    np.add.at(sums, group, places)
    np.add.at(counts, group, 1)
    return sums[group] / counts[group]


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="all-minilm")
    with Engine(parser.parse_args().model) as engine:
        with (DATA / "stsb" / "sts-test.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        left, right = (engine.embed([row[column] for row in rows]) for column in (5, 6))
        human = ranks(np.array([float(row[4]) for row in rows]))
        folder = DATA / "scifact"
        documents = [json.loads(line) for line in (folder / "corpus.jsonl").read_text(encoding="utf-8").split("\n") if line]
        lines = [json.loads(line) for line in (folder / "queries.jsonl").read_text(encoding="utf-8").split("\n") if line]
        queries = {row["_id"]: row["text"] for row in lines}
        with (folder / "qrels" / "test.tsv").open(newline="") as file:
            judged = [(row["query-id"], row["corpus-id"], int(row["score"])) for row in csv.DictReader(file, delimiter="\t")]
        wanted = list(dict.fromkeys(query for query, _, _ in judged))
        texts = engine.embed([f"{document['title']} {document['text']}" for document in documents], input_type="document")
        asked = engine.embed([queries[query] for query in wanted], input_type="query")
    number = {document["_id"]: index for index, document in enumerate(documents)}
    gains = np.zeros([len(wanted), len(documents)])
    for query, document, score in judged:
        gains[wanted.index(query), number[document]] = score
    discount = 1 / np.log2(np.arange(10) + 2)
    print("| dimensions | STS-B | SciFact |\n| --- | --- | --- |")
    width = left.shape[1]
    for dimensions in (width, *(size for size in (256, 128, 64) if size < width)):
        one, two, many, few = (normalize(vectors[:, :dimensions]) for vectors in (left, right, texts, asked))
        spearman = np.corrcoef(ranks((one * two).sum(1)), human)[0, 1]
        best = np.argsort(-(few @ many.T), axis=1)[:, :10]
        found = (np.take_along_axis(gains, best, axis=1) * discount).sum(1)
        ideal = (-np.sort(-gains, axis=1)[:, :10] * discount).sum(1)
        print(f"| {dimensions} | {100 * spearman:.1f} | {100 * (found / ideal).mean():.1f} |")


if __name__ == "__main__":
    main()
