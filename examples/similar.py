"""Embed real sentences with the default model and print which of them are most similar. Run it with ``make demo``."""

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
    "Packing short texts into one batch wastes less work than padding each.",
]


def main() -> None:
    """Embed the sentences, compare every pair, and print the most similar sentence for each."""
    begun = time.perf_counter()
    with Engine() as engine:
        vectors = engine.embed(SENTENCES)
        seconds = time.perf_counter() - begun
        print(f"{len(vectors)} sentences, {vectors.shape[1]} numbers each, on {engine.device.name}")
        print(f"model {engine.spec.name}, loaded and compiled, sentences embedded in {seconds:.1f} s\n")
    similarities = vectors @ vectors.T
    for index, sentence in enumerate(SENTENCES):
        others = [other for other in range(len(SENTENCES)) if other != index]
        best = max(others, key=lambda other: similarities[index, other])
        print(f"{similarities[index, best]:.2f}  {sentence}\n      {SENTENCES[best]}")


if __name__ == "__main__":
    main()
