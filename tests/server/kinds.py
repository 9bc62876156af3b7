"""A server with one model of each kind."""

import asyncio
from typing import Any

import httpx

from conftest import GOLDEN
from npu_proxy import Settings
from npu_proxy.server.http.app import create_app
from npu_proxy.server.models.loaded import LoadedModels

EMBEDDER, RERANKER, CLASSIFIER = "mean", "bert_rerank", "roberta_labels"


class Kinds:
    """A server with an embedding model, a reranker and a classifier, called from one thread."""

    def __init__(self, **settings: Any) -> None:
        names = (EMBEDDER, RERANKER, CLASSIFIER)
        aliases = (f"embedder={EMBEDDER}", f"voyage-context-3={EMBEDDER}")
        chosen: dict[str, Any] = {"model": tuple(str(GOLDEN / name) for name in names), "served_model_name": aliases}
        self.settings = Settings(**{**chosen, "device": "cpu", "load_on_demand": False, "cache_mb": 0, **settings})
        self._loop = asyncio.new_event_loop()
        self.models = LoadedModels(self.settings)
        self._loop.run_until_complete(self.models.start())
        self._app = create_app(self.models, self.settings)

    def engine(self, name: str) -> Any:
        """The engine of one of the models."""
        return next(model.engine for model in self.models.loaded() if model.name.endswith(name))

    def call(self, method: str, path: str, body: object = None, **options: Any) -> httpx.Response:
        """Send a request."""

        async def run() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self._app), base_url="http://localhost") as http:
                return await http.request(method, path, json=body, **options)

        return self._loop.run_until_complete(run())

    def post(self, path: str, body: object, **options: Any) -> httpx.Response:
        """Send a request with a body."""
        return self.call("POST", path, body, **options)

    def stop(self) -> None:
        """Stop the models."""
        self._loop.run_until_complete(self.models.stop())
        self._loop.close()
