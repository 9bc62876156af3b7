"""The split of Banking77 on which the example classifier was trained and is judged.

Only the 3,080 queries of the data set's test part are here, 40 per class; so ten of each class, chosen by hash, are held out,
and thirty are for training. The figures are therefore not those of the official split.
"""

import csv
import hashlib
from collections import defaultdict
from pathlib import Path

HELD_OUT = 10

Labelled = list[tuple[str, str]]
"""Texts and the names of their classes."""


def banking(folder: Path) -> tuple[Labelled, Labelled]:
    """The queries for training, and those held out. folder: that of test.csv."""
    classes: defaultdict[str, list[str]] = defaultdict(list)
    with (folder / "test.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            classes[row["category"]].append(row["text"])
    train: Labelled = []
    held: Labelled = []
    for name, texts in sorted(classes.items()):
        ordered = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
        held += [(text, name) for text in ordered[:HELD_OUT]]
        train += [(text, name) for text in ordered[HELD_OUT:]]
    return train, held
