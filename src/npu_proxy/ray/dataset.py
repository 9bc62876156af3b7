"""Ray Data: a dataset with vectors, computed by actors that each hold an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
import pyarrow as pa

from npu_proxy.bulk.columns import ColumnOptions, Columns, OutputName, columns_of, joined
from npu_proxy.bulk.readers import Block
from npu_proxy.bulk.texts import TextSource
from npu_proxy.engine.options import RequestOptions
from npu_proxy.errors import InputError
from npu_proxy.ray.worker import Work, make_work
from npu_proxy.settings import Settings
from npu_proxy.types import EmbedResult, OutputType, TextInput

_OUTPUT_TYPES: dict[OutputName, OutputType] = {
    "dense": OutputType.DENSE,
    "sparse": OutputType.SPARSE,
    "tokens": OutputType.TOKENS,
    "labels": OutputType.SCORES,
    "relevance": OutputType.SCORES,
}


def embed_dataset(
    dataset: Any,
    *,
    text: str | TextSource = "text",
    output: OutputName = "dense",
    column: str = "embedding",
    settings: Settings | None = None,
    workers: int | tuple[int, int] | tuple[int, int, int] = 1,
    cpus: int = 1,
    resources: dict[str, float] | None = None,
    batch_size: int = 1024,
    **options: Unpack[RequestOptions],
) -> Any:
    """A ray.data.Dataset with the columns of ``dataset`` and `embedding`, `tokens`, `truncated` and `error`.

    text: the column of texts, or a TextSource with a template. output: `dense`, `sparse`, `tokens`, `labels`, or `relevance` (of
    the text to TextSource.query). workers: how many actors, or the fewest and the most of an autoscaling pool. cpus, resources: of
    each. batch_size: rows per call of an actor, whose engine packs them. options: as in Engine.embed.

    A text that cannot be embedded is null, with the reason in `error`; any other error fails the task, and Ray tries it again.
    Checkpoints of Ray Data (DataContext.checkpoint_config) work as usual, since all columns are kept.
    """
    work = make_work(settings or Settings(), _OUTPUT_TYPES[output], options, cpus)
    source = TextSource(field=text) if isinstance(text, str) else text
    return dataset.map_batches(
        Embedder,
        fn_constructor_args=(work, source, output, column),
        batch_format="pyarrow",
        batch_size=batch_size,
        concurrency=workers,
        num_cpus=cpus,
        resources=resources,
        max_restarts=-1,
        max_task_retries=-1,
    )


class Embedder:
    """What an actor of Ray Data does with each batch."""

    def __init__(self, work: Work, source: TextSource, output: OutputName, column: str) -> None:
        self._work = work
        self._source = source
        self._engine = work.engine().start()
        self._columns: Columns = columns_of(output, self._engine.spec, work.options, ColumnOptions(name=column))

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The batch with the computed columns."""
        block = Block(file="dataset", unit="row", places=range(batch.num_rows), table=batch)
        texts = self._source.texts(block)
        good = np.array([not isinstance(text, InputError) for text in texts], np.bool_)
        given: list[TextInput] = [text for text in texts if not isinstance(text, InputError)]
        computed = self._computed(given)
        order = np.where(good, np.cumsum(good) - 1, 0)
        columns = computed.take(pa.array(order, mask=~good))
        errors = columns["error"].to_pylist()
        errors = [str(text) if isinstance(text, InputError) else error for text, error in zip(texts, errors, strict=True)]
        columns = columns.set_column(columns.schema.get_field_index("error"), "error", pa.array(errors, pa.string()))
        for name in columns.schema.names:
            if name in batch.schema.names:
                raise InputError(f"the dataset has a column `{name}`, and so has the result; rename it, or set `column`")
            batch = batch.append_column(name, columns[name])
        return batch

    def _computed(self, texts: Sequence[TextInput]) -> pa.Table:
        if not texts:
            return self._columns.schema.empty_table().append_column("error", pa.array([], pa.string()))
        work = self._work
        result: EmbedResult = joined(list(self._engine.results(texts, output_type=work.output_type, **work.options)))
        blameless = next((error for error in result.errors if error is not None and not isinstance(error, InputError)), None)
        if blameless is not None:
            raise blameless
        errors = [error and str(error) for error in result.errors]
        return self._columns.table(texts, result).append_column("error", pa.array(errors, pa.string()))
