"""Embeds real sentences with the default model and prints which of them are most alike. Run it with ``make demo``."""

import time

from npu_proxy import Engine

SENTENCES = [
    "My card was declined at the supermarket.",
    "Why did the shop refuse my payment?",
    "How do I change the PIN of my card?",
    "The cat sleeps on the warm windowsill.",
    "A kitten naps in the sun by the window.",
    "Interest rates rose by a quarter of a point.",
    "The central bank raised borrowing costs.",
    "Packing short texts into one row wastes less work than padding each.",
]


def main() -> None:
    """Embed, compare every pair, print the best partner of each sentence."""
    begun = time.perf_counter()
    with Engine() as engine:
        vectors = engine.embed(SENTENCES)
        seconds = time.perf_counter() - begun
        print(f"{len(vectors)} sentences, {vectors.shape[1]} numbers each, on {engine.device.name}")
        print(f"model {engine.spec.name}, loaded, compiled and answered in {seconds:.1f} s\n")
    likeness = vectors @ vectors.T
    for index, sentence in enumerate(SENTENCES):
        others = [other for other in range(len(SENTENCES)) if other != index]
        best = max(others, key=lambda other: likeness[index, other])
        print(f"{likeness[index, best]:.2f}  {sentence}\n      {SENTENCES[best]}")


if __name__ == "__main__":
    main()
