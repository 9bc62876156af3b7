"""Trains examples/models/scifact-reranker, a cross-encoder of two layers.

    make example-models

A teacher says how well each document of SciFact fits a query: a logistic regression of three scores (BM25, the default
model's cosine, SPLADE-tiny's product), fitted to the training claims. The student learns its logits for those claims, whose
relevant documents are raised, and for sentences and titles of the corpus as queries. No claim of the test part is read.
"""

import argparse
import csv
import json
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import bm25s
import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression
from tiny import padded, seed, start, texts_of, write
from torch.nn import functional

from npu_proxy import Engine, Pooling, Settings
from peers import splade_folder

LENGTH, GROUP, GROUPS, RATE = 256, 8, 8, 3e-4
CLAIMS = 0.35
"""The share of groups that are training claims."""

_WORDS = re.compile(r"[a-z0-9]+")

Scores = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Queries:
    """Texts to learn from, the documents that answer each, and the teacher's logits [queries, documents]."""

    texts: Sequence[str]
    answers: Sequence[Sequence[int]]
    logits: Scores


def read(data: Path) -> tuple[list[str], list[tuple[str, list[int]]], list[tuple[int, str]]]:
    """Documents, training claims with their documents, and sentences and titles with the document that they are from."""
    documents = [json.loads(line) for line in (data / "corpus.jsonl").read_text(encoding="utf-8").split("\n") if line]
    numbers = {document["_id"]: number for number, document in enumerate(documents)}
    queries = [json.loads(line) for line in (data / "queries.jsonl").read_text(encoding="utf-8").split("\n") if line]
    wanted: dict[str, list[int]] = {}
    with (data / "qrels" / "train.tsv").open(newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            if int(row["score"]) > 0:
                wanted.setdefault(row["query-id"], []).append(numbers[row["corpus-id"]])
    claims = [(query["text"], wanted[query["_id"]]) for query in queries if query["_id"] in wanted]
    own: list[tuple[int, str]] = []
    for number, document in enumerate(documents):
        body = re.sub(r"\b[A-Z][A-Z ]{4,}\b:? ?", "", document["text"])  # headings such as RESULTS
        sentences = [part for part in re.split(r"(?<=[.!?]) +", body) if 7 <= len(part.split()) <= 40]
        own += [(number, sentence) for sentence in random.sample(sentences, min(3, len(sentences)))]
        own += [(number, document["title"])] if random.random() < 0.3 else []
    return [f"{document['title']} {document['text']}".strip() for document in documents], claims, own


class Judge:
    """Scores of three kinds for queries and the documents, which are read once."""

    def __init__(self, documents: Sequence[str]) -> None:
        self._bm25 = bm25s.BM25(k1=1.2)
        self._bm25.index([_WORDS.findall(text.lower()) for text in documents], show_progress=False)
        self._engines = [Engine().start(), Engine(splade_folder(), settings=Settings(pooling=Pooling.SPLADE)).start()]
        self._vectors = self._engines[0].embed(documents)
        self._weights = self._sparse(documents)

    def features(self, queries: Sequence[str]) -> Scores:
        """BM25, cosine of the default model, product of SPLADE-tiny: [queries, documents, 3], of mean 0 and deviation 1."""
        known = self._bm25.vocab_dict
        words = [[word for word in _WORDS.findall(text.lower()) if word in known] for text in queries]
        lexical = np.stack([self._bm25.get_scores(query_words) for query_words in words])
        cosine = self._engines[0].embed(queries) @ self._vectors.T
        product = (self._sparse(queries) @ self._weights.T).toarray()
        scores = np.stack([lexical, cosine, product], axis=-1).astype(np.float32)
        return (scores - scores.mean(1, keepdims=True)) / (scores.std(1, keepdims=True) + 1e-9)

    def _sparse(self, texts: Sequence[str]) -> csr_matrix:
        vectors = list(self._engines[1].embed_sparse(texts))
        rows = np.concatenate([np.full(len(vector.indices), number) for number, vector in enumerate(vectors)])
        columns, values = (np.concatenate([vector[part] for vector in vectors]) for part in (0, 1))
        return csr_matrix((values, (rows, columns)), (len(vectors), self._engines[1].spec.width))

    def close(self) -> None:
        """Stop the engines."""
        for engine in self._engines:
            engine.stop()


def teach(
    documents: Sequence[str], claims: Sequence[tuple[str, list[int]]], own: Sequence[tuple[int, str]]
) -> tuple[Queries, Queries]:
    """What the teacher says of the claims and of the corpus' own sentences."""
    judge = Judge(documents)
    of_claims = judge.features([text for text, _ in claims])
    rows, labels = [], []
    for number, (_, relevant) in enumerate(claims):
        best = np.argsort(-of_claims[number] @ np.array([1, 1.5, 0.5]))[:50]
        for document in {*best.tolist(), *relevant}:
            rows.append(of_claims[number, document])
            labels.append(document in relevant)
    fitted = LogisticRegression().fit(rows, labels)
    weights, bias = fitted.coef_[0].astype(np.float32), np.float32(fitted.intercept_[0])
    print(f"the teacher's weights: BM25 {weights[0]:.2f}, cosine {weights[1]:.2f}, SPLADE {weights[2]:.2f}, bias {bias:.2f}")
    logits = np.concatenate([judge.features(part) @ weights + bias for part in _parts([text for _, text in own], 2048)])
    judge.close()
    return (
        Queries([text for text, _ in claims], [relevant for _, relevant in claims], of_claims @ weights + bias),
        Queries([text for _, text in own], [[number] for number, _ in own], logits),
    )


def _parts(texts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for first in range(0, len(texts), size):
        yield texts[first : first + size]


def group(queries: Queries, *, judged: bool) -> tuple[int, list[int], Scores]:
    """A query, GROUP documents (one that answers it, hard ones, a random one), and what their logits should be.

    A sentence is in its document word for word, which is too easy, so that document is there half the time only.
    """
    number = random.randrange(len(queries.texts))
    logits, answers = queries.logits[number], queries.answers[number]
    best = np.argpartition(-logits, 40)[:40]
    others = [document for document in best[np.argsort(-logits[best])].tolist() if document not in answers]
    chosen = [random.choice(answers)] if judged or random.random() < 0.5 else []
    left = GROUP - len(chosen) - 1
    chosen += [others[0], *random.sample(others[1:12], left // 2)]
    chosen += [*random.sample(others[12:], GROUP - len(chosen) - 1), random.randrange(len(logits))]
    wanted = np.minimum(logits[chosen], 6)
    if judged:
        wanted += np.where([document in answers for document in chosen], 2.0, -0.5)
    return number, chosen, wanted.astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000, help="of 64 pairs")
    arguments = parser.parse_args()
    seed()
    documents, claims, own = read(arguments.data / "scifact")
    known = [*documents, *(text["text"] for text in texts_of(arguments.data))]
    model, tokenizer, written = start(known, ["relevance"])
    judged, unjudged = teach(documents, claims, own)
    encode = lambda texts, most: [encoding.ids[:most] for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]  # noqa: E731
    tokens = encode(documents, 500)
    asked = {id(queries): encode(queries.texts, 80) for queries in (judged, unjudged)}
    first, last = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    losses: list[float] = []
    began = time.monotonic()
    model.train()
    for step in range(arguments.steps):
        for settings in optimizer.param_groups:
            settings["lr"] = RATE * min(1, (step + 1) / 50) * (1 - step / arguments.steps)
        lines, types, wanted = [], [], []
        for _ in range(GROUPS):
            queries = judged if random.random() < CLAIMS else unjudged
            number, chosen, logits = group(queries, judged=queries is judged)
            query = [first, *asked[id(queries)][number], last]
            for document in chosen:
                text = [*tokens[document][: LENGTH - len(query) - 1], last]
                lines.append(query + text)
                types.append([0] * len(query) + [1] * len(text))
            wanted.append(logits)
        scores = model(**padded(lines, types)).logits[:, 0].view(GROUPS, GROUP)
        goal = torch.tensor(np.stack(wanted))
        margins = (scores - scores.mean(1, keepdim=True)) - (goal - goal.mean(1, keepdim=True))
        loss = 0.3 * ((margins**2).mean() + 0.2 * ((scores - goal) ** 2).mean())
        loss = loss + functional.kl_div(scores.log_softmax(1), goal.softmax(1), reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1)
        optimizer.step()
        losses.append(loss.item())
        if step % 250 == 249:
            print(f"step {step + 1}, {time.monotonic() - began:.0f} s, loss {np.mean(losses[-250:]):.3f}", flush=True)
    activation = {"activation_fn": "torch.nn.modules.activation.Sigmoid", "version": "5.0.0"}
    write(model, written, arguments.output, sentence_transformers=activation)


if __name__ == "__main__":
    main()
