"""The real OpenAI SDK, sync and async, against a real server with the real model; vectors checked, not only shapes."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai.types import CreateEmbeddingResponse

from conftest import Server, smallest_cosine


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as made:
        yield made


def vectors_of(response: CreateEmbeddingResponse) -> np.ndarray:
    return np.array([entry.embedding for entry in response.data], np.float32)


@pytest.mark.parametrize(
    "options", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}], ids=["default", "float", "base64"]
)
@pytest.mark.parametrize("model", ["all-minilm", "sentence-transformers/all-MiniLM-L6-v2"])
def test_vectors(client: openai.OpenAI, reference: tuple[list[dict], np.ndarray], options: dict, model: str) -> None:
    rows, vectors = reference
    response = client.embeddings.create(model=model, input=[row["text"] for row in rows[:40]], **options)
    if options.get("encoding_format") == "base64":
        import base64

        coded: list[Any] = [entry.embedding for entry in response.data]  # strings, which the SDK's types do not know
        found = np.stack([np.frombuffer(base64.b64decode(text), "<f4") for text in coded])
    else:
        found = vectors_of(response)
    assert smallest_cosine(found, vectors[:40]) >= 0.99999
    assert response.usage.prompt_tokens == sum(min(row["tokens"], 256) for row in rows[:40])
    assert response.model == model


def test_async_client_dimensions_and_token_ids(server: Server, reference: tuple[list[dict], np.ndarray]) -> None:
    rows, vectors = reference

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
            calls = [client.embeddings.create(model="all-minilm", input=row["text"], dimensions=64) for row in rows[-19:]]
            found = np.concatenate([vectors_of(answer) for answer in await asyncio.gather(*calls)])
            assert smallest_cosine(found, vectors[-19:, :64]) >= 0.9999
            np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
            # "hello world", four times over, in the model's own vocabulary.
            ids = await client.embeddings.create(model="all-minilm", input=[7592, 2088] * 4)
            text = await client.embeddings.create(model="all-minilm", input="hello world " * 4)
            np.testing.assert_array_equal(vectors_of(ids), vectors_of(text))

    asyncio.run(run())


def test_models_and_errors_arrive_as_the_sdks_own_classes(client: openai.OpenAI) -> None:
    model = next(model for model in client.models.list().data if "MiniLM-L6" in model.id or model.id == "all-minilm")
    assert client.models.retrieve(model.id) == model
    with pytest.raises(openai.NotFoundError) as missing:
        client.embeddings.create(model="gpt-4", input="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model="all-minilm", input="")
    with pytest.raises(openai.BadRequestError, match="between 1 and 384"):
        client.embeddings.create(model="all-minilm", input="a", dimensions=385)
    with pytest.raises(openai.APIStatusError) as late:
        client.with_options(timeout=20).embeddings.create(
            model="all-minilm", input=["long " * 250 + str(n) for n in range(256)], extra_headers={"x-request-timeout": "0.05"}
        )
    assert late.value.status_code in (413, 504)  # refused at once if the speed is known, and then not sent again


def test_sigterm_drains_and_exits_0(default_model: str) -> None:
    own = Server("--drain", "30").wait_ready()
    texts = [f"a text of some length, number {n}, so that there is work to do " * 8 for n in range(60)]
    script = (
        "import openai, sys; c = openai.OpenAI(base_url=sys.argv[1], api_key='x', max_retries=0);"
        "print(len(c.embeddings.create(model='all-minilm', input=sys.stdin.read().split(chr(10))).data))"
    )
    busy = subprocess.Popen(
        [sys.executable, "-c", script, f"{own.url}/v1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert busy.stdin is not None
    busy.stdin.write("\n".join(texts))
    busy.stdin.close()
    busy.stdin = None
    give_up = time.monotonic() + 20
    while time.monotonic() < give_up:  # until the request is in
        if '"texts":60' in urllib.request.urlopen(f"{own.url}/health").read().decode():
            break
    own.process.send_signal(signal.SIGTERM)
    output, _ = busy.communicate(timeout=60)
    assert output.strip() == "60"
    while own.process.poll() is None:  # as an impatient operator: more signals change nothing
        own.process.send_signal(signal.SIGTERM)
    assert own.stop() == 0


def test_a_model_that_is_not_there_ends_the_server_with_code_2(tmp_path: Path) -> None:
    server = Server("--model", "no/such", NPU_PROXY_STORE=str(tmp_path))
    with pytest.raises(AssertionError, match="npu-proxy pull no/such"):
        server.wait_ready()
    assert server.stop() == 2


def test_a_taken_port_is_one_clear_line(default_model: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "npu_proxy", "serve", "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ, check=False)
    assert done.returncode == 2
    assert "Address already in use; set `host` or `port`" in done.stderr
    assert "Traceback" not in done.stderr
