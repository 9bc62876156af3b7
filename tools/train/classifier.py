"""Trains examples/models/banking77-classifier, a classifier of two layers.

    make example-models

First the student learns the default model's vectors of sentences that have nothing to do with banking, then the thirty
queries per class of bench/banking.py: their classes, what a logistic regression over the default model's vectors gives each
class, and those vectors. Words are left out at random. The ten queries per class that are held out are not read.
"""

import argparse
import csv
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from tiny import padded, seed, start, texts_of, write
from torch.nn import functional

from banking import banking
from npu_proxy import Engine

RATE, SENTENCES, FIRST_BATCH, BATCH, LONGEST = 5e-4, 35_000, 96, 64, 64


def sentences(data: Path) -> list[str]:
    """Sentences of every text of corpus.jsonl but those of Banking77, and of the development part of STS-B."""
    found: list[str] = []
    for entry in texts_of(data):
        if entry["source"] != "banking77":
            parts = [part for part in re.split(r"(?<=[.!?])\s+", entry["text"]) if 5 <= len(part.split()) <= 40]
            found += random.sample(parts, min(5, len(parts)))
    with (data / "stsb" / "sts-dev.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            found += row[5:7]
    random.shuffle(found)
    return found[:SENTENCES]


def train(parameters: Sequence[torch.nn.Parameter], steps: int, name: str, loss_of: Callable[[], torch.Tensor]) -> None:
    """``steps`` steps of AdamW with a rate that falls to 0."""
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01)
    began, losses = time.monotonic(), []
    for step in range(steps):
        for settings in optimizer.param_groups:
            settings["lr"] = RATE * min(1, (step + 1) / 50) * (1 - step / steps)
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 500 == 499:
            print(f"{name}: step {step + 1}, {time.monotonic() - began:.0f} s, loss {np.mean(losses[-500:]):.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, nargs=2, default=(3000, 3000))
    arguments = parser.parse_args()
    seed()
    known, (labelled, _) = sentences(arguments.data), banking(arguments.data / "banking77")
    labels = sorted({name for _, name in labelled})
    queries = [text for text, _ in labelled]
    classes = torch.tensor([labels.index(name) for _, name in labelled])
    with Engine() as engine:
        seen, asked = (torch.tensor(engine.embed(texts)) for texts in (known, queries))
    teacher = LogisticRegression(C=10, max_iter=2000).fit(asked.numpy(), classes.numpy())
    shares = torch.tensor(teacher.predict_proba(asked.numpy()), dtype=torch.float32)
    model, tokenizer, written = start([*(entry["text"] for entry in texts_of(arguments.data)), *queries * 3], labels)
    tokenizer.enable_truncation(LONGEST)
    lines = [encoding.ids for encoding in tokenizer.encode_batch([*known, *queries * 8])]
    vectors = torch.cat([seen, asked.repeat(8, 1)])
    bridge = torch.nn.Linear(model.config.hidden_size, vectors.shape[1])
    parameters = [*model.parameters(), *bridge.parameters()]
    model.train()

    def vectors_loss() -> torch.Tensor:
        chosen = random.sample(range(len(lines)), FIRST_BATCH)
        wanted = vectors[chosen]
        found = functional.normalize(bridge(model.bert(**padded([lines[number] for number in chosen])).pooler_output), dim=1)
        return (1 - (found * wanted).sum(1)).mean() + 3 * ((found @ found.T - wanted @ wanted.T) ** 2).mean()

    def classes_loss() -> torch.Tensor:
        chosen = random.sample(range(len(queries)), BATCH)
        given = padded([_some(lines[len(known) + number]) for number in chosen])
        pooled = model.bert(**given).pooler_output
        logits = model.classifier(model.dropout(pooled))
        loss = functional.cross_entropy(logits, classes[chosen], label_smoothing=0.1)
        loss = loss + functional.kl_div(logits.log_softmax(1), shares[chosen], reduction="batchmean")
        return loss + 0.5 * (1 - (functional.normalize(bridge(pooled), dim=1) * asked[chosen]).sum(1)).mean()

    train(parameters, arguments.steps[0], "vectors", vectors_loss)
    train(parameters, arguments.steps[1], "classes", classes_loss)
    write(model, written, arguments.output, problem_type="single_label_classification")


def _some(line: Sequence[int]) -> list[int]:
    """The tokens of a text, one in ten left out."""
    inner = [token for token in line[1:-1] if random.random() > 0.1]
    return [line[0], *(inner or line[1:-1]), line[-1]]


if __name__ == "__main__":
    main()
