"""An adapter from an engine to mteb's EncoderProtocol, for benchmarks. Needs the package mteb (version 2), which needs torch.

>>> import mteb                                                                                     # doctest: +SKIP
>>> with Engine() as engine:                                                                        # doctest: +SKIP
...     mteb.evaluate(MtebEncoder(engine), tasks=[mteb.get_task("STSBenchmark")])
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from npu_proxy.engine.engine import Engine
from npu_proxy.engine.similarity import normalize

Array = npt.NDArray[np.float32]


class MtebEncoder:
    """Wraps a started engine of a dense model. Uses the model's prompts for queries and documents, if it has them."""

    def __init__(self, engine: Engine) -> None:
        """engine: the caller starts and stops it."""
        self._engine = engine

    def encode(self, inputs: Iterable[Mapping[str, Any]], *, prompt_type: object = None, **_: Any) -> Array:
        """Unit vectors [n, width] float32 of the texts of a data loader, in order. Other arguments are ignored."""
        side = {"query": "query", "document": "document", "passage": "document"}.get(
            str(getattr(prompt_type, "value", prompt_type))
        )
        return np.stack(list(self._engine.stream(_texts(inputs), input_type=side)))

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Array:
        """Similarities [n, m] of two sets of vectors, by the model's own similarity function."""
        return self._engine.similarity(np.asarray(embeddings1), np.asarray(embeddings2))

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Array:
        """Cosine similarities [n] of pairs of vectors."""
        first, second = (normalize(np.asarray(vectors, np.float32)) for vectors in (embeddings1, embeddings2))
        return (first * second).sum(axis=1)

    @property
    def mteb_model_meta(self) -> Any:
        """The metadata that mteb stores with its scores; the revision is the fingerprint."""
        from mteb.models.model_meta import ModelMeta  # type: ignore[import-not-found]  # an optional package

        spec = self._engine.spec
        metadata = {
            "name": f"npu-proxy/{spec.name.replace('/', '__')}",
            "revision": spec.fingerprint,
            "embed_dim": spec.width,
            "max_tokens": spec.max_length,
            "use_instructions": bool(spec.prompts),
        }
        create: Any = ModelMeta.create_empty  # type: ignore[reportUnknownMemberType]
        return create(metadata)


def _texts(inputs: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The texts of all batches."""
    for batch in inputs:
        yield from batch["text"]
