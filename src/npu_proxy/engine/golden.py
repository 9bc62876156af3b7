"""Golden texts as batches of any shape, for certification and health checks."""

from __future__ import annotations

from collections.abc import Sequence

from npu_proxy.batch import Batch, BatchShape, Encoding
from npu_proxy.devices.canary import CANARY_TEXTS, MOST_CANARY_TOKENS
from npu_proxy.engine.packing import aligned, fill_bins, pack
from npu_proxy.engine.tokenize import RequestTokenizer
from npu_proxy.spec import ModelSpec

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
"""Short texts, long ones, one beyond every limit, several scripts. Certificates refer to these texts; do not change them."""


class GoldenBatches:
    """Makes a batch of golden texts for any shape: as many texts as fit, always including the longest."""

    def __init__(self, tokenizer: RequestTokenizer, spec: ModelSpec) -> None:
        self._encodings = tokenizer.plain(GOLDEN_TEXTS)
        short = {encoding.key: encoding for encoding in tokenizer.plain(CANARY_TEXTS)}
        self.canaries: Sequence[Encoding] = [encoding for encoding in short.values() if 0 < encoding.tokens <= MOST_CANARY_TOKENS]
        """The canaries; empty if the tokenizer makes long texts, or nothing, of them."""
        self._layout = spec.batch_layout
        self._output_type = spec.output_type

    def __call__(self, shape: BatchShape) -> Batch:
        """Return the batch for a shape, without a deadline."""
        fitting = [_cut(encoding, shape.positions) for encoding in self._encodings]
        fitting.sort(key=lambda encoding: -encoding.tokens)
        encodings = fitting * shape.bins
        plan = fill_bins([aligned(encoding.tokens, self._layout.align) for encoding in encodings], shape)
        return pack(encodings, plan, self._layout, self._output_type)

    def canary_batch(self, shape: BatchShape) -> Batch:
        """Return a batch of all canaries as its texts, in any order. Raises ValueError if they do not fit into the shape."""
        lengths = [aligned(canary.tokens, self._layout.align) for canary in self.canaries]
        plan = fill_bins(lengths, shape)
        batch = pack(self.canaries, plan, self._layout, self._output_type)
        if len(batch.slots) < len(self.canaries):
            raise ValueError(f"the canaries do not fit into a batch of {shape}")
        return batch


def _cut(encoding: Encoding, positions: int) -> Encoding:
    """Cut a text to ``positions`` tokens, keeping its last token (which may be special)."""
    ids = encoding.ids
    return encoding if len(ids) <= positions else Encoding(ids=ids[[*range(positions - 1), -1]], truncated=True)
