"""The server's process: listen at once, load behind it, say when ready, drain on SIGTERM, exit 0."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from npu_proxy.devices.base import Device
from npu_proxy.engine.async_engine import AsyncEngine
from npu_proxy.errors import NpuProxyError, SettingsError
from npu_proxy.server.app import State, create_app
from npu_proxy.settings import Settings

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Server(uvicorn.Server):
    """uvicorn, but a signal that asked for a clean stop is a success: it is not raised again afterwards."""

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        def ask(number: int, frame: FrameType | None) -> None:
            self.handle_exit(number, frame)

        for number in _STOP_SIGNALS:
            signal.signal(number, ask)
        try:
            yield
        finally:
            # The process ends now; a second signal must not turn its clean exit into a kill.
            for number in _STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)


def serve(settings: Settings) -> int:
    """Run until SIGTERM or SIGINT. Returns the exit code: 0 after a drain, 2 when the model cannot be loaded, 1 otherwise."""
    engine = AsyncEngine(settings=settings)
    outcome = {"code": 0}

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None]:
        task = asyncio.create_task(_load(app.state.npu_proxy, server, outcome))
        yield
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await engine.astop()

    config = uvicorn.Config(
        create_app(engine, settings, lifespan),
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.drain)),
    )
    server = _Server(config)
    with _listen(settings) as listener:
        server.run(sockets=[listener])
    return outcome["code"]


def _listen(settings: Settings) -> socket.socket:
    """The listening socket. Raises SettingsError when the address cannot be had."""
    try:
        family, *_, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((str(address[0]), int(address[1])), family=family, backlog=2048)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno is not None and error.errno > 0 else error.strerror
        message = f"cannot listen on {settings.host}:{settings.port}: {reason}; set `host` or `port`"
        raise SettingsError(message, param="port") from error


async def _load(state: State, server: _Server, outcome: dict[str, int]) -> None:
    """Load the model, then print the ready line; a model that cannot be loaded ends the server with the reason."""
    try:
        await state.engine.astart()
        while not (server.started or server.should_exit):  # noqa: ASYNC110 (uvicorn tells of its socket in no other way)
            await asyncio.sleep(0.01)
    except NpuProxyError as error:
        state.failure = str(error)
        outcome["code"] = 2
        print(f"npu-proxy: {error}", file=sys.stderr, flush=True)
        server.should_exit = True
        return
    except Exception:
        outcome["code"] = 1
        server.should_exit = True
        raise
    spec, device = state.engine.engine.spec, state.engine.engine.device
    print(
        f"npu-proxy ready: http://{_address(server, state.settings)} model {spec.name} ({spec.width} wide, up to"
        f" {spec.max_length} tokens) on {answering(device)}, fingerprint {spec.fingerprint}",
        file=sys.stderr,
        flush=True,
    )


def answering(device: Device) -> str:
    """`npu (compiling; cpu answers)`: the chain's devices and who takes rows at this moment."""
    reports = device.reports()
    now = next((report.name for report in reports if report.state == "serving"), "none")
    precision = "" if reports[0].precision == "fp32" else f" in {reports[0].precision}"
    if reports[0].name == now:
        return f"{now}{precision}"
    return f"{reports[0].name} ({reports[0].state}; {now} answers){precision}"


def _address(server: _Server, settings: Settings) -> str:
    """Host and port as they are bound, also where the port was 0."""
    listeners = [listener for one in server.servers for listener in one.sockets]
    port = listeners[0].getsockname()[1] if listeners else settings.port
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{host}:{port}"
