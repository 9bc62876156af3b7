"""The wrapper for mteb, by the protocol's own calls; mteb itself runs in bench/mteb_sts.py."""

from enum import Enum

import numpy as np

from conftest import golden
from npu_proxy import Engine
from npu_proxy.bulk.mteb import MtebEncoder


class PromptType(Enum):
    query = "query"
    document = "document"


def test_batches_become_vectors_with_the_prompt_of_their_side() -> None:
    folder, texts, vectors = golden("mean")
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    with Engine(folder, "cpu") as engine:
        model = MtebEncoder(engine)
        batches = [{"text": texts[:4]}, {"text": texts[4:]}]
        found = model.encode(batches, task_metadata=None, hf_split="test", hf_subset="default")
        np.testing.assert_allclose(found, unit, atol=1e-5)
        queries = model.encode(batches, task_metadata=None, hf_split="test", hf_subset="default", prompt_type=PromptType.query)
        np.testing.assert_allclose(queries, engine.embed(texts, input_type="query"), atol=1e-6)
        np.testing.assert_allclose(model.similarity(found, found), unit @ unit.T, atol=1e-5)
        np.testing.assert_allclose(model.similarity_pairwise(found, queries), (unit * queries).sum(1), atol=1e-5)
