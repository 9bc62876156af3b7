"""embed: texts from the command line, from files or from standard input become vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import pyarrow as pa

from npu_proxy.bulk.columns import ColumnOptions, OutputName, columns_of
from npu_proxy.bulk.job import Job, stream
from npu_proxy.bulk.readers import Block
from npu_proxy.bulk.rows import RowOptions
from npu_proxy.bulk.texts import TextSource
from npu_proxy.commands.files import INPUT, OUTPUT, InputFlags, OutputFlags, computing, make_job, run_job
from npu_proxy.commands.shared import DEFAULTS, SharedSettings
from npu_proxy.engine.encode_options import find_prompt
from npu_proxy.engine.engine import Engine
from npu_proxy.engine.options import RequestOptions, make_request
from npu_proxy.errors import InputError
from npu_proxy.types import Chunking, DType, Truncate


def embed(
    *texts: str,
    reading: InputFlags = INPUT,
    writing: OutputFlags = OUTPUT,
    dimensions: int | None = None,
    normalize: bool = True,
    truncate: Truncate = Truncate.END,
    chunks: Literal["rows", "mean"] | None = None,
    dtype: DType = DType.FLOAT32,
    output_type: Literal["dense", "sparse", "tokens"] = "dense",
    input_type: Literal["query", "document"] | None = None,
    prompt_name: str | None = None,
    batch_size: int = 256,
    parallel: int | None = None,
    settings: SharedSettings = DEFAULTS,
) -> None:
    """Embed texts from the command line, files or standard input.

    If neither texts nor --input are given, each line of standard input is a text. Prints a JSON object per text (index, embedding,
    tokens, truncated), or writes a file that also has the columns of the input. Equal texts are computed once.

    Parameters
    ----------
    texts
        Texts to embed.
    dimensions
        Keep only the first `dimensions` numbers of each vector, and normalize again (Matryoshka models).
    normalize
        Scale each vector to length 1.
    truncate
        What to do with texts longer than the model's limit: cut off the end, cut off the start, fail, or split them into
        chunks.
    chunks
        What becomes of the chunks of a long text: a row for each, with its position in the text (in files), or their mean (on
        standard output).
    dtype
        Number format of the output.
    output_type
        One dense vector per text, a sparse one (weights of vocabulary entries), or one vector per token.
    input_type
        Use the model's prompt for queries or documents, if it has one.
    prompt_name
        Use one of the model's prompts by name.
    batch_size
        Number of texts passed to the engine at once.
    parallel
        Number of worker processes, each with its own copy of the model; 0 means one per core.
    """
    if texts and reading.input:
        raise InputError("texts and --input cannot be combined; give one of them", param="input")
    per_chunk = truncate is Truncate.CHUNK and (chunks == "rows" or (chunks is None and writing.output is not None))
    if chunks is not None and truncate is not Truncate.CHUNK:
        raise InputError("--chunks has no effect without --truncate chunk", param="chunks")
    if per_chunk and output_type != "dense":
        raise InputError(f"a row per chunk is for dense vectors; for {output_type} ones, set --chunks mean", param="chunks")
    options: RequestOptions = {
        "dimensions": dimensions,
        "normalize": normalize,
        "truncate": truncate,
        "dtype": dtype,
        "input_type": input_type,
        "prompt_name": prompt_name,
    }
    if per_chunk:
        options["chunking"] = Chunking(spans=True)
    if writing.output is not None:
        settings = replace(settings, cache_mb=0)  # a job itself computes equal texts once; vectors on disk are still used
    with Engine(settings=settings) as engine:
        columns = columns_of(output_type, engine.spec, options, ColumnOptions(per_chunk=per_chunk))
        metadata = job_metadata(engine, output_type, options)
        job = None if texts else make_job(reading.text(), reading, writing, columns, metadata)
        with computing(engine, columns.output_type, options, writing, batch_size=batch_size, parallel=parallel) as compute:
            if job is not None:
                run_job(engine, job, compute, writing)
                return
            if writing.output is not None:
                raise InputError("--output needs --input; texts on the command line are printed", param="output")
            rows = RowOptions(text=TextSource(), columns=columns, keep=())
            given = Job(files=[], rows=rows, metadata=metadata, on_error=writing.on_error or "stop")
            stream(given, [_given(texts)], compute)


def _given(texts: Sequence[str]) -> Block:
    """Texts of the command line as rows."""
    table = pa.table({"text": pa.array(texts, pa.string())})
    return Block(file="command line", unit="text", places=range(1, len(texts) + 1), table=table)


def job_metadata(engine: Engine, output_type: OutputName, options: RequestOptions) -> dict[str, Any]:
    """What made the vectors; stored in files, and compared when a job is resumed."""
    request = make_request(["a"], options, None)
    spec = engine.spec
    return {
        "model": spec.name,
        "fingerprint": spec.fingerprint,
        "precision": spec.precision,
        "output_type": str(output_type),
        "instruction": find_prompt(spec, request),
        "dimensions": request.dimensions or spec.width,
        "normalized": request.normalize,
        "dtype": str(request.dtype),
        "truncate": str(request.truncate),
    }
