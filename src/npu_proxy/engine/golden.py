"""Golden texts as rows of any shape: what certification compares and what health checks run."""

from __future__ import annotations

from npu_proxy.engine.packing import fill_bins, pack, room
from npu_proxy.engine.tokenize import TextEncoder
from npu_proxy.graph.packed import RowFormat, RowShape
from npu_proxy.types import Encoding, Job, Lane, ModelSpec, Pack

_LONG = (
    "The segment of a row that belongs to one text must not see the segment of another, whatever lies between them: "
    "numbers such as 3.14159 and -273.15, names like Zurich or Sao Paulo, and words no vocabulary has, for example "
    "grundgesetzlich or pneumonoultramicroscopic. "
)
GOLDEN_TEXTS = (
    "a",
    "What is the capital of France?",
    "The quick brown fox jumps over the lazy dog.",
    "Grüße aus Köln: 1.234,56 € — schön!",
    "東京は日本の首都です。",
    "def add(a, b):\n    return a + b",
    "I would like to dispute a payment that appears twice on my card statement, please help me as soon as you can.",
    "Mitochondrial membrane potential was reduced by 42% (p < 0.001) in treated cells compared with controls.",
    _LONG,
    _LONG * 3,
    _LONG * 200,
)
"""Short, long, beyond every limit; several scripts. Certificates hold for these."""


class GoldenRows:
    """A row of golden texts for a shape: as many of them as fit, the longest always in."""

    def __init__(self, encoder: TextEncoder, spec: ModelSpec) -> None:
        self._encodings = encoder.plain(GOLDEN_TEXTS)
        self._layout = RowFormat.of(spec)
        self._kind = spec.kind

    def __call__(self, shape: RowShape) -> Pack:
        """The row; its jobs belong to nobody."""
        fitting = [_cut(encoding, shape.positions) for encoding in self._encodings]
        fitting.sort(key=lambda encoding: -encoding.tokens)
        jobs = [Job(encoding=encoding, lane=Lane.BULK, queued_at=0.0, waiters=[]) for encoding in fitting * shape.bins]
        plan = fill_bins([room(job.encoding.tokens, self._layout.align) for job in jobs], shape)
        return pack(jobs, plan, self._layout, self._kind)


def _cut(encoding: Encoding, positions: int) -> Encoding:
    """The text within ``positions`` tokens, its last token (which may be special) kept."""
    ids = encoding.ids
    return encoding if len(ids) <= positions else Encoding(ids=ids[[*range(positions - 1), -1]], truncated=True)
