"""One system under test in a process and environment of its own. Standard library here; each system imports its own.

    python worker.py SYSTEM MODEL_FOLDER ONNX_FOLDER

Reads JSON lines {"texts": PATH, "vectors": PATH or null}, embeds the file's list of texts, answers {"seconds": s}.
The first line out, {"ready": true}, comes after the first vector; every answer carries the peak memory in MB.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

LIMIT = 256
Embed = Callable[[list[str]], object]


def npu_proxy(model: Path, onnx: Path) -> Embed:
    from npu_proxy import Engine, Settings

    return Engine(model, settings=Settings(profile=False, cache_mb=0)).start().embed


def sentence_transformers(model: Path, onnx: Path) -> Embed:
    from sentence_transformers import SentenceTransformer

    loaded = SentenceTransformer(str(model), device="cpu")
    assert loaded.max_seq_length == LIMIT
    return lambda texts: loaded.encode(texts, normalize_embeddings=True, show_progress_bar=False)


def fastembed(model: Path, onnx: Path) -> Embed:
    import numpy as np
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    TextEmbedding.add_custom_model(
        model="local/minilm", pooling=PoolingType.MEAN, normalization=True, sources=ModelSource(hf="local/minilm"), dim=384
    )
    loaded = TextEmbedding("local/minilm", specific_model_path=str(onnx))
    return lambda texts: np.stack(list(loaded.embed(texts)))


def infinity(model: Path, onnx: Path) -> Embed:
    import asyncio

    import numpy as np
    from infinity_emb import AsyncEmbeddingEngine, EngineArgs

    loop = asyncio.new_event_loop()
    arguments = EngineArgs(model_name_or_path=str(model), engine="torch", device="cpu", model_warmup=False, bettertransformer=False)
    engine = AsyncEmbeddingEngine.from_args(arguments)
    loop.run_until_complete(engine.astart())
    return lambda texts: np.stack(loop.run_until_complete(engine.embed(sentences=texts))[0])


def openvino_genai(model: Path, onnx: Path) -> Embed:
    import numpy as np
    import openvino as ov
    import openvino_genai as genai
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    folder = onnx.parent / "genai"
    if not (folder / "openvino_model.xml").exists():
        folder.mkdir(exist_ok=True)
        ov.save_model(convert_tokenizer(AutoTokenizer.from_pretrained(model)), folder / "openvino_tokenizer.xml")
        ov.save_model(ov.convert_model(onnx / "onnx" / "model.onnx"), folder / "openvino_model.xml", compress_to_fp16=False)
        (folder / "config.json").write_text((model / "config.json").read_text())
    config = genai.TextEmbeddingPipeline.Config()
    config.pooling_type = genai.TextEmbeddingPipeline.PoolingType.MEAN
    config.normalize = True
    config.max_length = LIMIT
    loaded = genai.TextEmbeddingPipeline(str(folder), "CPU", config)
    return lambda texts: np.array(
        [vector for i in range(0, len(texts), 32) for vector in loaded.embed_documents(texts[i : i + 32])], np.float32
    )


def onnxruntime(model: Path, onnx: Path) -> Embed:
    """Batches of similar length within a budget of padded tokens: what a careful user writes in an afternoon."""
    import numpy as np
    import onnxruntime as ort
    from tokenizers import Tokenizer

    session = ort.InferenceSession(str(onnx / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    names = {given.name for given in session.get_inputs()}
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LIMIT)

    def embed(texts: list[str]) -> np.ndarray:
        encodings = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        vectors = np.zeros((len(texts), 384), np.float32)
        batch: list[int] = []
        for index in sorted(range(len(texts)), key=lambda i: len(encodings[i])) + [-1]:
            if batch and (index < 0 or (len(batch) + 1) * len(encodings[index]) > 2048):
                ids = np.zeros((len(batch), len(encodings[batch[-1]])), np.int64)
                mask = np.zeros_like(ids)
                for row, i in enumerate(batch):
                    ids[row, : len(encodings[i])], mask[row, : len(encodings[i])] = encodings[i], 1
                feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
                hidden = np.asarray(session.run(None, {name: value for name, value in feed.items() if name in names})[0])
                pooled = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdims=True)
                vectors[batch] = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
                batch = []
            batch.append(index)
        return vectors

    return embed


SYSTEMS: dict[str, Callable[[Path, Path], Embed]] = {
    "npu-proxy": npu_proxy,
    "sentence-transformers": sentence_transformers,
    "infinity": infinity,
    "openvino-genai": openvino_genai,
    "fastembed": fastembed,
    "onnxruntime": onnxruntime,
}


def peak_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    system, model, onnx = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    answers = sys.stdout
    sys.stdout = sys.stderr  # libraries print
    embed = SYSTEMS[system](model, onnx)
    embed(["the first vector"])
    print(json.dumps({"ready": True, "peak_mb": peak_mb()}), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        texts = json.loads(Path(order["texts"]).read_text())
        begun = time.perf_counter()
        vectors = embed(texts)
        seconds = time.perf_counter() - begun
        if order.get("vectors"):
            import numpy as np

            np.save(order["vectors"], np.asarray(vectors))
        print(json.dumps({"seconds": seconds, "peak_mb": peak_mb()}), file=answers, flush=True)


if __name__ == "__main__":
    main()
