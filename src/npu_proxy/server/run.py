"""The server's process: listen at once, load behind it, say when ready, drain on SIGTERM, exit 0."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import sys
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from npu_proxy.devices.base import Device
from npu_proxy.errors import NpuProxyError, SettingsError
from npu_proxy.server import auth, logs
from npu_proxy.server.app import create_app
from npu_proxy.server.protocol import drop_silent_peers, protocol_of
from npu_proxy.server.registry import Registry
from npu_proxy.settings import Settings

_AFTER_DRAIN = 3
"""Seconds for sending the last answers."""
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Server(uvicorn.Server):
    """uvicorn, but a signal that asked for a clean stop is a success: it is not raised again afterwards.

    And what is not answered when the drain is over is answered with 503, before uvicorn would cancel it.
    """

    registry: Registry

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then fail what is left, then go."""
        last = asyncio.create_task(self._end_of_drain())
        try:
            await super().shutdown(sockets)
        finally:
            last.cancel()

    async def _end_of_drain(self) -> None:
        await asyncio.sleep(self.registry.settings.drain)
        await asyncio.gather(*(self.registry.in_thread(one.engine.stop, 0.0) for one in self.registry.loaded()))

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
    """Run until SIGTERM or SIGINT. Returns the exit code: 0 after a drain, 2 when a model cannot be loaded, 1 otherwise."""
    logs.configure(settings)
    registry = Registry(settings)
    outcome = {"code": 0}

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None]:
        task = asyncio.create_task(_load(registry, server, outcome))
        yield
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await registry.stop()
        tracer = app.state.npu_proxy.tracer
        if tracer is not None:
            await asyncio.to_thread(tracer.close)

    keys = auth.read_keys(settings)
    config = uvicorn.Config(
        create_app(registry, settings, lifespan, keys),
        http=protocol_of(settings),
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_keep_alive=max(1, round(settings.idle_timeout)),
        timeout_graceful_shutdown=round(settings.drain) + _AFTER_DRAIN,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
    )
    server = _Server(_checked(config))
    server.registry = registry
    if auth.is_open(settings, keys):
        print(f"npu-proxy: `insecure` is set: whoever reaches {settings.host} may use this server", file=sys.stderr, flush=True)
    _raise_file_limit()
    with _listen(settings) as listener:
        own = settings.uds.stat() if settings.uds is not None else None
        try:
            server.run(sockets=[listener])
        finally:
            if settings.uds is not None and own is not None and settings.uds.exists() and settings.uds.stat().st_ino == own.st_ino:
                settings.uds.unlink(missing_ok=True)  # a successor may listen there already
    return outcome["code"]


def _checked(config: uvicorn.Config) -> uvicorn.Config:
    """Load the certificate now, so that what is wrong with it is one line. Raises SettingsError."""
    if config.ssl_keyfile and not config.ssl_certfile:
        raise SettingsError("`ssl_keyfile` is of no use without `ssl_certfile`", param="ssl_certfile")
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is one
        message = f"`ssl_certfile` or `ssl_keyfile` cannot be read: {error.strerror or error}"
        raise SettingsError(message, param="ssl_certfile") from error
    return config


def _listen(settings: Settings) -> socket.socket:
    """The listening socket. Raises SettingsError when the address cannot be had."""
    if settings.uds is not None:
        return _listen_unix(settings.uds)
    try:
        family, *_, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server((str(address[0]), int(address[1])), family=family, backlog=2048)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno is not None and error.errno > 0 else error.strerror
        message = f"cannot listen on {settings.host}:{settings.port}: {reason}; set `host` or `port`"
        raise SettingsError(message, param="port") from error
    drop_silent_peers(listener, settings.header_timeout)
    return listener


def _listen_unix(path: Path) -> socket.socket:
    """A socket that only this user can open. One that a dead server left behind is replaced, a live one is not."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.settimeout(1.0)
                if probe.connect_ex(str(path)) == 0:
                    raise SettingsError(f"another server listens on {path}; set `uds`", param="uds")
            path.unlink()
        mask = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(mask)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise SettingsError(f"cannot listen on {path}: {error.strerror or error}; set `uds`", param="uds") from error
    except SettingsError:
        listener.close()
        raise
    return listener


def _raise_file_limit() -> None:
    """As many connections as the system allows this process."""
    if sys.platform != "win32":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _load(registry: Registry, server: _Server, outcome: dict[str, int]) -> None:
    """Load the models, then print the ready line; a model that cannot be loaded ends the server with the reason."""
    try:
        await registry.start()
        while not (server.started or server.should_exit):  # noqa: ASYNC110 (uvicorn tells of its socket in no other way)
            await asyncio.sleep(0.01)
    except NpuProxyError as error:
        registry.failure = str(error)
        outcome["code"] = 2
        print(f"npu-proxy: {error}", file=sys.stderr, flush=True)
        server.should_exit = True
        return
    except Exception:
        outcome["code"] = 1
        server.should_exit = True
        raise
    for one in registry.loaded():
        spec = one.engine.spec
        print(
            f"npu-proxy ready: {_address(server, registry.settings)} model {spec.name} ({spec.width} wide, up to"
            f" {spec.max_length} tokens) on {answering(one.engine.device)}, fingerprint {spec.fingerprint}",
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
    """The URL as it is bound, also where the port was 0."""
    scheme, prefix = "https" if settings.ssl_certfile else "http", "/" + settings.url_prefix.strip("/")
    if settings.uds is not None:
        return f"unix:{settings.uds}"
    listeners = [listener for one in server.servers for listener in one.sockets]
    port = listeners[0].getsockname()[1] if listeners else settings.port
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{scheme}://{host}:{port}{prefix.rstrip('/')}"
