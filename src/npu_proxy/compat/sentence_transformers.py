"""sentence-transformers' SentenceTransformer, CrossEncoder and SparseEncoder (version 6) over an engine.

Arguments and results are theirs. What would change numbers and cannot be obeyed is refused by name; `batch_size`, `chunk_size` and
progress bars have no meaning for an engine that packs texts, and are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from npu_proxy.compat.engines import as_tensor, has_torch, open_engine, refuse
from npu_proxy.engine.engine import Engine
from npu_proxy.engine.scoring import probabilities
from npu_proxy.engine.similarity import normalize
from npu_proxy.engine.similarity import similarity as similarities
from npu_proxy.engine.vector_quantization import Precision, quantize_embeddings
from npu_proxy.errors import InputError
from npu_proxy.models.tokenizer_file import open_tokenizer
from npu_proxy.settings import Settings
from npu_proxy.types import OutputType, Pair, Similarity

Array = npt.NDArray[Any]
_INIT = {
    "modules": "pass a folder or the name of a model",
    "revision": "pull it with `npu-proxy pull NAME --revision`",
    "trust_remote_code": "no code of a model is run",
    "model_kwargs": "use the settings `precision` and `device`",
    "processor_kwargs": "they are read from the model's files",
    "tokenizer_kwargs": "they are read from the model's files",
    "config_kwargs": "they are read from the model's files",
    "num_labels": "it is read from the model's files",
    "keep_in_fp32_modules": "use the setting `precision`",
}
_IGNORED = ("cache_folder", "token", "use_auth_token", "model_card_data", "backend")
Pool = Mapping[str, Any]


class _Encoder:
    """What the three classes share: the engine, prompts, and the order of arguments."""

    def __init__(
        self,
        model_name_or_path: str | None = None,
        *,
        device: str | None = None,
        prompts: Mapping[str, str] | None = None,
        default_prompt_name: str | None = None,
        local_files_only: bool = False,
        settings: Settings | None = None,
        **others: Any,
    ) -> None:
        """settings: of the engine, in addition to theirs."""
        refuse({name: value for name, value in others.items() if name not in _IGNORED}, _INIT)
        if model_name_or_path is None:
            raise InputError("a model is needed: its name, or its folder", param="model_name_or_path")
        self._engine: Engine = open_engine(
            model_name_or_path, device=device, settings=settings, local_files_only=local_files_only, on_empty="embed"
        )
        self.prompts: dict[str, str] = {**self._engine.spec.prompts, **(prompts or {})}
        self.default_prompt_name: str | None = default_prompt_name or self._engine.spec.default_prompt
        if self.default_prompt_name is not None and self.default_prompt_name not in self.prompts:
            raise InputError(
                f"there is no prompt `{self.default_prompt_name}`; known: {sorted(self.prompts)}", param="default_prompt_name"
            )

    @property
    def device(self) -> str:
        """The device of the engine."""
        return self._engine.device.name

    @property
    def max_seq_length(self) -> int:
        """Maximum number of tokens of a text."""
        return self._engine.spec.max_length

    def get_max_seq_length(self) -> int:
        """Maximum number of tokens of a text."""
        return self._engine.spec.max_length

    def eval(self) -> Self:
        """Nothing to do: an engine does not train."""
        return self

    def to(self, device: object) -> Self:
        """Nothing to do for the engine's own device. Raises InputError for others."""
        if str(device) not in (self.device, "cpu"):
            raise InputError(f"this model is on {self.device}; choose another device when you make it", param="device")
        return self

    def start_multi_process_pool(self, target_devices: Sequence[str] | None = None) -> Pool:
        """A pool for ``encode(pool=...)``: worker processes, as many as devices are named (None: one per core)."""
        return {"processes": len(target_devices) if target_devices else 0}

    @staticmethod
    def stop_multi_process_pool(pool: Pool) -> None:
        """Nothing to do: workers end with each call."""

    def _prompt(self, prompt_name: str | None, prompt: str | None) -> str:
        if prompt is not None:
            return prompt
        name = prompt_name or self.default_prompt_name
        if name is None:
            return ""
        if name not in self.prompts:
            raise ValueError(
                f"Prompt name '{name}' not found in the configured prompts dictionary with keys {list(self.prompts)!r}."
            )
        return self.prompts[name]

    def _prompt_of(self, kinds: Sequence[str], prompt_name: str | None, prompt: str | None) -> str | None:
        """The name of the prompt for queries or documents, unless another one is asked for."""
        if prompt is not None or prompt_name is not None:
            return prompt_name
        return next((kind for kind in kinds if kind in self.prompts), None)


class SentenceTransformer(_Encoder):
    """Dense vectors. truncate_dim: keep only so many numbers of each vector, without normalizing again."""

    def __init__(
        self,
        model_name_or_path: str | None = None,
        *,
        similarity_fn_name: Literal["cosine", "dot", "euclidean", "manhattan"] | None = None,
        truncate_dim: int | None = None,
        **others: Any,
    ) -> None:
        super().__init__(model_name_or_path, **others)
        self.similarity_fn_name: Similarity = similarity_fn_name or self._engine.spec.similarity
        self.truncate_dim = truncate_dim

    def encode(
        self,
        inputs: Any = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: str | None = "sentence_embedding",
        precision: Precision = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: object = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        pool: Pool | None = None,
        chunk_size: int | None = None,
        **others: Any,
    ) -> Any:
        """Vectors [n, width] of n texts, or [width] of a single one."""
        inputs = others.pop("sentences", inputs)  # its name before version 5.1
        refuse(others, {})
        if output_value != "sentence_embedding":
            raise InputError(
                "only sentence_embedding is supported; for token vectors, use Engine.embed_tokens", param="output_value"
            )
        single = isinstance(inputs, str)
        texts = [inputs] if single else list(inputs)
        vectors = self._vectors(
            texts, self._prompt(prompt_name, prompt), normalize_embeddings, truncate_dim or self.truncate_dim, pool
        )
        if precision != "float32":
            vectors = quantize_embeddings(vectors, precision, calibration=vectors if precision in ("int8", "uint8") else None)
        if convert_to_tensor:
            tensor = as_tensor(vectors)
            return tensor[0] if single else tensor
        if not convert_to_numpy:
            tensors = list(as_tensor(vectors))
            return tensors[0] if single else tensors
        return vectors[0] if single else vectors

    def encode_query(
        self, inputs: Any, prompt_name: str | None = None, prompt: str | None = None, *others: Any, **named: Any
    ) -> Any:
        """Like ``encode``, with the prompt `query` if there is one."""
        return self.encode(inputs, self._prompt_of(["query"], prompt_name, prompt), prompt, *others, **named)

    def encode_document(
        self, inputs: Any, prompt_name: str | None = None, prompt: str | None = None, *others: Any, **named: Any
    ) -> Any:
        """Like ``encode``, with the prompt `document`, `passage` or `corpus` if there is one."""
        name = self._prompt_of(["document", "passage", "corpus"], prompt_name, prompt)
        return self.encode(inputs, name, prompt, *others, **named)

    def encode_multi_process(
        self, sentences: Sequence[str], pool: Pool, prompt_name: str | None = None, prompt: str | None = None, **named: Any
    ) -> Array:
        """Like ``encode`` with worker processes."""
        return self.encode(list(sentences), prompt_name, prompt, pool=pool, **named)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Similarities [n, m]; a tensor if torch is in use."""
        left, right = (np.atleast_2d(np.asarray(vectors, np.float32)) for vectors in (embeddings1, embeddings2))
        found = similarities(left, right, self.similarity_fn_name)
        return as_tensor(found) if has_torch() else found

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Similarities [n] of pairs of vectors; a tensor if torch is in use."""
        left, right = (np.atleast_2d(np.asarray(vectors, np.float32)) for vectors in (embeddings1, embeddings2))
        pairs = [
            similarities(one[None], other[None], self.similarity_fn_name)[0, 0] for one, other in zip(left, right, strict=True)
        ]
        found = np.array(pairs, np.float32)
        return as_tensor(found) if has_torch() else found

    def get_sentence_embedding_dimension(self) -> int:
        """Width of a vector."""
        return self.truncate_dim or self._engine.spec.width

    def get_embedding_dimension(self) -> int:
        """Width of a vector."""
        return self.get_sentence_embedding_dimension()

    def _vectors(self, texts: Sequence[str], prompt: str, normalized: bool, dimensions: int | None, pool: Pool | None) -> Array:
        if not texts:
            return np.zeros([0, dimensions or self._engine.spec.width], np.float32)
        parallel = pool["processes"] if pool is not None else None
        # As there: the model's own Normalize comes before the dimensions are cut, `normalize_embeddings` after it.
        stream = self._engine.stream(texts, parallel=parallel, prompt=prompt, normalize=self._engine.spec.normalizes)
        vectors = np.stack(list(stream))[:, :dimensions]
        return normalize(vectors) if normalized else np.ascontiguousarray(vectors)


class CrossEncoder(_Encoder):
    """Scores of pairs of texts."""

    def __init__(
        self, model_name_or_path: str | None = None, *, max_length: int | None = None, activation_fn: Any = None, **others: Any
    ) -> None:
        if max_length is not None:
            settings = others.pop("settings", None) or Settings()
            others["settings"] = replace(settings, max_length=max_length)
        super().__init__(model_name_or_path, **others)
        self.activation_fn: Callable[[Any], Any] | None = activation_fn

    def predict(
        self,
        inputs: Any = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[[Any], Any] | None = None,
        apply_softmax: bool | None = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: object = None,
        pool: Pool | None = None,
        chunk_size: int | None = None,
        **others: Any,
    ) -> Any:
        """Scores [n] of n pairs, or [n, labels] if the model has several labels."""
        inputs = others.pop("sentences", inputs)
        refuse(
            {"prompt_name": prompt_name, "prompt": prompt},
            {"prompt": "rerankers here have none", "prompt_name": "rerankers here have none"},
        )
        refuse(others, {})
        single = len(inputs) == 2 and all(isinstance(text, str) for text in inputs)
        pairs = [Pair(*pair) for pair in ([inputs] if single else inputs)]
        scores = self._scores(pairs, activation_fn or self.activation_fn, bool(apply_softmax))
        if convert_to_tensor:
            tensor = as_tensor(scores)
            return tensor[0] if single else tensor
        if not convert_to_numpy:
            tensors = list(as_tensor(scores))
            return tensors[0] if single else tensors
        return scores[0] if single else scores

    def rank(
        self, query: str, documents: Sequence[str], top_k: int | None = None, return_documents: bool = False, **named: Any
    ) -> list[dict[str, Any]]:
        """Documents by score, best first: corpus_id, score, and text if ``return_documents``."""
        if len(self._engine.spec.labels) > 1:
            raise ValueError("CrossEncoder.rank() only works for models with num_labels=1.")
        scores = self.predict([(query, document) for document in documents], **named)
        order = np.argsort(-np.asarray(scores), kind="stable")[:top_k]
        found = [{"corpus_id": int(index), "score": scores[index]} for index in order]
        return [{**one, "text": documents[one["corpus_id"]]} for one in found] if return_documents else found

    def _scores(self, pairs: Sequence[Pair], activation: Callable[[Any], Any] | None, softmax: bool) -> Array:
        spec = self._engine.spec
        labels = max(1, len(spec.labels))
        results = self._engine.results(pairs, output_type=OutputType.SCORES)
        raw = activation is not None or labels > 1
        found = [probabilities(spec, result, raw=raw) for result in results]
        scores = np.concatenate(found) if found else np.zeros([0, labels], np.float32)
        if activation is not None:
            scores = np.asarray(activation(as_tensor(scores)), np.float32)
        if softmax and labels > 1:
            exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
            scores = exponentials / exponentials.sum(axis=1, keepdims=True)
        return scores[:, 0] if labels == 1 else scores


class SparseEncoder(_Encoder):
    """Sparse vectors: weights of vocabulary entries, as sparse tensors, or as dense ones."""

    def __init__(self, model_name_or_path: str | None = None, *, max_active_dims: int | None = None, **others: Any) -> None:
        refuse({"similarity_fn_name": others.pop("similarity_fn_name", None)}, {}, (None, "dot"))
        super().__init__(model_name_or_path, **others)
        self.max_active_dims = max_active_dims

    def encode(
        self,
        inputs: Any = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        convert_to_tensor: bool = True,
        convert_to_sparse_tensor: bool = True,
        save_to_cpu: bool = False,
        device: object = None,
        max_active_dims: int | None = None,
        pool: Pool | None = None,
        chunk_size: int | None = None,
        **others: Any,
    ) -> Any:
        """Vectors [n, vocabulary], or [vocabulary] of a single text; lists of them if ``convert_to_tensor`` is off."""
        inputs = others.pop("sentences", inputs)
        refuse(others, {})
        single = isinstance(inputs, str)
        texts = [inputs] if single else list(inputs)
        found = self._engine.embed_sparse(texts, prompt=self._prompt(prompt_name, prompt)) if texts else []
        most = max_active_dims or self.max_active_dims
        import torch  # type: ignore[import-not-found]  # its results are tensors, as there

        rows: list[Any] = []
        for vector in found:
            order = np.argsort(-vector.values, kind="stable")[:most]
            dense = np.zeros(self.get_embedding_dimension(), np.float32)
            dense[vector.indices[order]] = vector.values[order]
            tensor = torch.as_tensor(dense)
            rows.append(tensor.to_sparse() if convert_to_sparse_tensor else tensor)
        if single:
            return rows[0]
        return torch.stack(rows) if convert_to_tensor and rows else rows

    def encode_query(
        self, inputs: Any, prompt_name: str | None = None, prompt: str | None = None, *others: Any, **named: Any
    ) -> Any:
        """Like ``encode``, with the prompt `query` if there is one."""
        return self.encode(inputs, self._prompt_of(["query"], prompt_name, prompt), prompt, *others, **named)

    def encode_document(
        self, inputs: Any, prompt_name: str | None = None, prompt: str | None = None, *others: Any, **named: Any
    ) -> Any:
        """Like ``encode``, with the prompt `document`, `passage` or `corpus` if there is one."""
        name = self._prompt_of(["document", "passage", "corpus"], prompt_name, prompt)
        return self.encode(inputs, name, prompt, *others, **named)

    def decode(self, embeddings: Any, top_k: int | None = None) -> Any:
        """The tokens of a vector (or of several) and their weights, largest first."""
        rows = embeddings.to_dense() if embeddings.is_sparse else embeddings
        single = rows.ndim == 1
        tokenizer, _ = open_tokenizer(self._engine.spec.tokenizer)
        decoded: list[list[tuple[str, float]]] = []
        for row in np.atleast_2d(rows.numpy()):
            order = [int(index) for index in np.argsort(-row, kind="stable")[:top_k] if row[index] != 0]
            decoded.append([(tokenizer.id_to_token(index) or "", float(row[index])) for index in order])
        return decoded[0] if single else decoded

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Dot products [n, m]."""
        left, right = (vectors.to_dense() if vectors.is_sparse else vectors for vectors in (embeddings1, embeddings2))
        return (left if left.ndim == 2 else left[None]) @ (right if right.ndim == 2 else right[None]).T

    @staticmethod
    def sparsity(embeddings: Any) -> dict[str, float]:
        """The mean number of weights that are not zero, and the share of those that are."""
        rows = embeddings.to_dense() if embeddings.is_sparse else embeddings
        rows = rows if rows.ndim == 2 else rows[None]
        active = (rows != 0).sum(dim=1).float().mean().item()
        return {"active_dims": active, "sparsity_ratio": 1 - active / rows.shape[1]}

    def get_embedding_dimension(self) -> int:
        """Size of the vocabulary."""
        return self._engine.spec.width
