"""The split of Banking77 that the example classifier was trained and is judged on.

Of the data set only the 3,080 queries of its test part are here, 40 a class; so of each class ten are held out, chosen by
hash, and thirty are for training. Figures are therefore not those of the official split.
"""

import csv
import hashlib
from collections import defaultdict
from pathlib import Path

HELD_OUT = 10

Labelled = list[tuple[str, str]]
"""Texts and the names of their classes."""


def banking(folder: Path) -> tuple[Labelled, Labelled]:
    """For training, and held out. folder: that of test.csv."""
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
