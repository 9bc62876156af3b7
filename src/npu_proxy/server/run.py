"""The server process: listen at once, load models in the background, report readiness, drain on SIGTERM, exit with 0."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import stat
import sys
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from npu_proxy.devices.base import Device
from npu_proxy.errors import NpuProxyError, SettingsError
from npu_proxy.server.http.app import AppState, create_app
from npu_proxy.server.http.clients import read_keys
from npu_proxy.server.http.hosts import is_exposed
from npu_proxy.server.http.protocol import drop_silent_peers, protocol_of
from npu_proxy.server.models.loaded import LoadedModels
from npu_proxy.server.ops import logs, systemd
from npu_proxy.server.ops.readiness import is_live
from npu_proxy.server.reload import reload
from npu_proxy.settings import Settings
from npu_proxy.system import check_not_public

_AFTER_DRAIN = 3
"""Seconds after the drain for sending the last responses."""
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Server(uvicorn.Server):
    """uvicorn's server, except that a signal that stops it cleanly is not raised again afterwards.

    Requests that are unfinished at the end of the drain get status 503 before uvicorn would cancel them.
    """

    registry: LoadedModels

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, fail the remaining requests, then shut down."""
        drain_end = asyncio.create_task(self._end_of_drain())
        try:
            await super().shutdown(sockets)
        finally:
            drain_end.cancel()

    async def _end_of_drain(self) -> None:
        await asyncio.sleep(self.registry.settings.drain)
        await asyncio.gather(*(self.registry.in_thread(model.engine.stop, 0.0) for model in self.registry.loaded()))

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        def request_exit(number: int, frame: FrameType | None) -> None:
            self.handle_exit(number, frame)

        for number in _STOP_SIGNALS:
            signal.signal(number, request_exit)
        try:
            yield
        finally:
            # The process is about to exit; a second signal must not turn its clean exit into a kill.
            for number in _STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)


def serve(settings: Settings, read: Callable[[], Settings] | None = None) -> int:
    """Run until SIGTERM or SIGINT. Returns the exit code: 0 after a drain, 2 if a model cannot be loaded, 1 otherwise.

    read: reads the settings again, on SIGHUP (reload.py).
    """
    logs.configure(settings)
    registry = LoadedModels(settings)
    outcome = {"code": 0}

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None]:
        task = asyncio.create_task(_load(registry, server, outcome))
        if read is not None and hasattr(signal, "SIGHUP"):
            reloads = _on_hangup(app.state.npu_proxy, read, config)
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reloads)
        watchdog = asyncio.create_task(systemd.keep_watchdog(lambda: is_live(registry)))
        lag = asyncio.create_task(app.state.npu_proxy.metrics.loop_lag.watch())
        yield
        systemd.notify("STOPPING=1")
        watchdog.cancel()
        lag.cancel()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await registry.stop()
        tracer = app.state.npu_proxy.tracer
        if tracer is not None:
            await asyncio.to_thread(tracer.close)

    keys = read_keys(settings)
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
    if is_exposed(settings) and not keys:
        print(
            f"npu-proxy: `insecure` is set: anyone who can reach {settings.host} may use this server", file=sys.stderr, flush=True
        )
    _raise_file_limit()
    with _listen(settings) as listener:
        bound = settings.uds.stat() if settings.uds is not None else None
        try:
            server.run(sockets=[listener])
        finally:
            if (
                settings.uds is not None
                and bound is not None
                and settings.uds.exists()
                and settings.uds.stat().st_ino == bound.st_ino
            ):
                settings.uds.unlink(missing_ok=True)  # unless another server has replaced it
    return outcome["code"]


def _on_hangup(state: AppState, read: Callable[[], Settings], config: uvicorn.Config) -> Callable[[], None]:
    """A function that reads the settings again and says what it took over."""
    tasks: set[asyncio.Task[None]] = set()
    turn = asyncio.Lock()

    async def take_over() -> None:
        async with turn:
            try:
                changes = await reload(state, read, config.ssl)
            except (NpuProxyError, OSError) as error:
                print(f"npu-proxy: the settings stay as they were: {error}", file=sys.stderr, flush=True)
            else:
                print(f"npu-proxy took over: {'; '.join(changes) or 'nothing has changed'}", file=sys.stderr, flush=True)

    def start() -> None:
        task = asyncio.get_running_loop().create_task(take_over())
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    return start


def _checked(config: uvicorn.Config) -> uvicorn.Config:
    """Load the certificate now, so that an error in it is reported in one line. Raises SettingsError."""
    if config.ssl_keyfile and not config.ssl_certfile:
        raise SettingsError("`ssl_keyfile` is set without `ssl_certfile`; set both", param="ssl_certfile")
    try:
        if config.ssl_keyfile:
            check_not_public(Path(config.ssl_keyfile))
        config.load()
    except OSError as error:  # includes ssl.SSLError
        message = f"`ssl_certfile` or `ssl_keyfile` cannot be read: {error.strerror or error}"
        raise SettingsError(message, param="ssl_certfile") from error
    return config


def _listen(settings: Settings) -> socket.socket:
    """Open the listening socket. Raises SettingsError if the address is not available."""
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
    """Open a Unix socket that only this user can connect to. Replaces the socket of a dead server, but not of a running one."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.settimeout(1.0)
                if probe.connect_ex(str(path)) == 0:
                    raise SettingsError(f"another server listens on {path}; set `uds` to another path", param="uds")
            path.unlink()
        mask = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(mask)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise SettingsError(
            f"cannot listen on {path}: {error.strerror or error}; set `uds` to another path", param="uds"
        ) from error
    except SettingsError:
        listener.close()
        raise
    return listener


def _raise_file_limit() -> None:
    """Allow as many open files, and so connections, as the system permits for this process."""
    if sys.platform != "win32":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _load(registry: LoadedModels, server: _Server, outcome: dict[str, int]) -> None:
    """Load the models, then print the ready line. If a model cannot be loaded, print the reason and stop the server."""
    try:
        await registry.start()
        while not (server.started or server.should_exit):  # noqa: ASYNC110 (uvicorn has no event for its socket)
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
    gc.collect()
    gc.freeze()  # what was loaded stays; collecting garbage later looks at requests alone, and takes a few milliseconds
    systemd.notify("READY=1")
    for model in registry.loaded():
        spec = model.engine.spec
        print(
            f"npu-proxy ready: {_address(server, registry.settings)} model {spec.name} ({spec.width} dimensions, up to"
            f" {spec.max_length} tokens) on {answering(model.engine.device)}, fingerprint {spec.fingerprint}",
            file=sys.stderr,
            flush=True,
        )


def answering(device: Device) -> str:
    """Describe the chain's first device and the one that serves requests now, such as `npu (compiling; cpu serving)`."""
    reports = device.reports()
    now = next((report.name for report in reports if report.state == "serving"), "none")
    precision = "" if reports[0].precision == "fp32" else f" in {reports[0].precision}"
    if reports[0].name == now:
        return f"{now}{precision}"
    return f"{reports[0].name} ({reports[0].state}; {now} serving){precision}"


def _address(server: _Server, settings: Settings) -> str:
    """Return the URL that the server listens on, with the actual port if the setting was 0."""
    scheme, prefix = "https" if settings.ssl_certfile else "http", "/" + settings.url_prefix.strip("/")
    if settings.uds is not None:
        return f"unix:{settings.uds}"
    listeners = [listener for asyncio_server in server.servers for listener in asyncio_server.sockets]
    port = listeners[0].getsockname()[1] if listeners else settings.port
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{scheme}://{host}:{port}{prefix.rstrip('/')}"
