"""Leave out texts that say the same as one before: `python examples/deduplicate.py vectors.parquet kept.parquet --least 0.9`.

vectors.parquet is the output of `npu-proxy embed --output vectors.parquet`. Compares every text with every one that was kept, in
blocks; for millions of texts, use an index of neighbours.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

BLOCK = 2048


def kept_rows(vectors: npt.NDArray[np.float32], least: float) -> npt.NDArray[np.int64]:
    """The rows [k] of unit vectors [n, width] whose cosine with every row kept before is below ``least``."""
    kept = np.zeros(0, np.int64)
    for start in range(0, len(vectors), BLOCK):
        block = vectors[start : start + BLOCK]
        is_new = np.ones(len(block), np.bool_)
        if len(kept):
            is_new = (block @ vectors[kept].T).max(axis=1) < least
        within = block @ block.T
        for row in range(len(block)):
            is_new[row] &= not (within[row, :row][is_new[:row]] >= least).any()
        kept = np.concatenate([kept, start + np.flatnonzero(is_new)])
    return kept


def main() -> None:
    """Write the rows that are kept, with all their columns."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("input", type=Path)
    arguments.add_argument("output", type=Path)
    arguments.add_argument("--least", type=float, default=0.9, help="cosine from which two texts say the same")
    given = arguments.parse_args()
    table: Any = pq.read_table(given.input)
    table = table.filter(table["embedding"].is_valid())
    width = table.schema.field("embedding").type.list_size
    flat = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    rows = kept_rows(np.asarray(flat, np.float32).reshape(-1, width), given.least)
    pq.write_table(table.take(pa.array(rows)), given.output)
    print(f"{len(rows)} of {len(table)} texts kept")


if __name__ == "__main__":
    main()
