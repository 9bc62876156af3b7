"""Search a folder of documents: chunk, embed, keep in LanceDB, rerank, and answer with the source.

    pip install npu-proxy[lancedb]
    python examples/search_folder.py docs "What happens to a row that is wrong?"

Run it again after documents have changed: only what changed is embedded, and what is gone is removed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from npu_proxy import Engine

RERANKER = Path(__file__).parent / "models" / "scifact-reranker"
SUFFIXES = (".md", ".txt", ".rst")


def index(folder: Path, database: Path) -> None:
    """Embed the folder's documents into the table `texts`, a row per chunk, in a job of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "documents.jsonl"
        with rows.open("w", encoding="utf-8") as file:
            for path in sorted(folder.rglob("*")):
                if path.suffix in SUFFIXES and (text := path.read_text(encoding="utf-8", errors="replace")).strip():
                    file.write(json.dumps({"source": str(path.relative_to(folder)), "text": text}) + "\n")
        command = [sys.executable, "-m", "npu_proxy", "embed", "--input", str(rows), "--output", f"lancedb:{database}#texts"]
        options = ["--truncate", "chunk", "--id-field", "source", "--update", "--input-type", "document"]
        subprocess.run([*command, *options], check=True, cwd=scratch)  # noqa: S603 (our own command)


def search(database: Path, question: str, count: int) -> list[dict[str, Any]]:
    """The chunks that answer the question best: fifty by their vectors, and of those the best by a cross-encoder."""
    import lancedb  # type: ignore[import-not-found]  # an optional package

    with Engine() as engine:
        vector = engine.embed([question], input_type="query")[0]
    table: Any = lancedb.connect(str(database)).open_table("texts")
    found = table.search(vector).distance_type("cosine").limit(50).to_list()
    with Engine(RERANKER) as reranker:
        best = reranker.rerank(question, [row["chunk_text"] for row in found], top_n=count)
    return [{**found[one.index], "score": one.score} for one in best]


def main() -> None:
    """Index the folder, and print the best chunks with their sources."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("question")
    arguments.add_argument("--database", type=Path, default=Path("documents.lance"))
    arguments.add_argument("--count", type=int, default=3)
    given = arguments.parse_args()
    database = given.database.resolve()
    index(given.folder, database)
    for row in search(database, given.question, given.count):
        print(f"{row['score']:.3f}  {row['source']}, characters {row['start']} to {row['stop']}")
        print(f"       {' '.join(row['chunk_text'].split())[:300]}\n")


if __name__ == "__main__":
    main()
