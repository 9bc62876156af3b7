"""Starting, stopping, starting again, and what is left when a caller interrupts, cancels, forgets or dies."""

import asyncio
import gc
import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import SMALL_SHAPES, golden, until_set
from npu_proxy import AsyncEngine, EmbedRequest, Engine, InputError, ModelError, Settings, StoppedError
from npu_proxy.devices.fake import FakeDevice
from npu_proxy.engine.components import EngineComponents
from npu_proxy.engine.tokenize import RequestTokenizer
from npu_proxy.models.layout import read_spec

SPEC = read_spec(golden("mean")[0])
SECONDS = 20.0


def engine_of(devices: list[FakeDevice], failures: int = 0, **settings: Any) -> Engine:
    """An engine that makes a new fake device at each start; ``devices`` collects them. failures: how many starts fail first."""
    left = [failures]

    def components(settings: Settings, _stopping: threading.Event) -> EngineComponents:
        if left[0]:
            left[0] -= 1
            raise ModelError("not now")
        devices.append(FakeDevice(width=SPEC.width, shapes=SMALL_SHAPES))
        return EngineComponents(spec=SPEC, tokenizer=RequestTokenizer(SPEC), device=devices[-1])

    return Engine(settings=Settings(**settings), components=components)


def slow_engine(event: threading.Event, **settings: Any) -> tuple[Engine, FakeDevice]:
    """An engine whose device computes nothing until the event is set."""
    device = FakeDevice(width=SPEC.width, shapes=SMALL_SHAPES, script=until_set(event))
    make = EngineComponents(spec=SPEC, tokenizer=RequestTokenizer(SPEC), device=device)
    return Engine(settings=Settings(cache_mb=0, **settings), components=lambda _settings, _stopping: make), device


def own_threads() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("npu-proxy"))


def until(condition: Any) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def interrupted(call: Callable[[], object]) -> None:
    """Call something and interrupt it."""
    timer = threading.Timer(0.3, interrupt_main_thread)
    timer.start()
    call()
    timer.join()


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Python's own handler of SIGINT, which a shell that started the tests in the background has turned off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_main_thread() -> None:
    """Ctrl-C; a signal to the process might go to another thread, which does not wake the main thread."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


# -- again ---------------------------------------------------------------------------------------------------------------


def test_a_stopped_engine_starts_again_on_new_devices_as_often_as_one_likes() -> None:
    devices: list[FakeDevice] = []
    engine = engine_of(devices)
    before = own_threads()
    expected = engine.embed(["the cat"])
    for _ in range(3):
        engine.stop()
        engine.stop()
        assert engine.state == "stopped"
        assert devices[-1].closed
        assert own_threads() == before
        with pytest.raises(StoppedError, match="start it again"):
            engine.embed(["the cat"])
        with engine:
            np.testing.assert_array_equal(engine.embed(["the cat"]), expected)
        engine.start()
        np.testing.assert_array_equal(engine.embed(["the dog", "the cat"])[1:], expected)
        engine.stop()
        engine.start()
    engine.stop()


def test_two_starts_at_once_make_one_device_also_after_a_stop() -> None:
    devices: list[FakeDevice] = []
    engine = engine_of(devices)
    with ThreadPoolExecutor(8) as threads:
        for number in range(1, 4):
            list(threads.map(lambda _: engine.start(), range(8)))
            assert len(devices) == number
            list(threads.map(lambda _: engine.stop(), range(8)))
        list(threads.map(lambda call: call(), [engine.start, engine.stop] * 20))
    engine.stop()
    assert all(device.closed for device in devices)


def test_after_a_failed_start_the_next_one_may_succeed() -> None:
    devices: list[FakeDevice] = []
    engine = engine_of(devices, failures=1)
    with pytest.raises(ModelError):
        engine.start()
    engine.start()
    engine.stop()
    with pytest.raises(ModelError):
        engine_of([], failures=9).start()
    again = engine_of(devices, failures=1)
    with pytest.raises(ModelError):
        again.embed(["a"])
    assert again.embed(["a"]).shape == (1, SPEC.width)
    again.stop()


def test_a_disk_cache_is_opened_again(tmp_path: Path) -> None:
    engine = engine_of([], cache_mb=0, cache_disk_mb=16, cache_folder=tmp_path)
    with engine:
        engine.embed(["the cat"])
    with engine:
        until(lambda: engine.submit(EmbedRequest(texts=["the cat"])).result(SECONDS).cached == 1)  # it opens in the background


def test_an_async_engine_starts_again_too() -> None:
    async def run() -> None:
        devices: list[FakeDevice] = []
        engine = AsyncEngine(engine=engine_of(devices))
        for number in (1, 2, 3):
            await asyncio.gather(*(engine.astart() for _ in range(4)))
            assert len(devices) == number
            assert (await engine.embed(["a"])).shape == (1, SPEC.width)
            await asyncio.gather(*(engine.astop() for _ in range(4)))
        with pytest.raises(StoppedError):
            await engine.embed(["a"])

    asyncio.run(run())


# -- both engines --------------------------------------------------------------------------------------------------------


def public(kind: type) -> dict[str, Any]:
    return {name: value for name, value in vars(kind).items() if not name.startswith("_") and name not in ("start", "stop")}


def test_async_engine_has_every_method_of_engine_with_the_same_parameters() -> None:
    plain, asynchronous = public(Engine), public(AsyncEngine)
    assert asynchronous.keys() == plain.keys() | {"astart", "astop", "settings"}  # Engine's is an attribute
    for name, method in plain.items():
        if isinstance(method, property):
            assert isinstance(asynchronous[name], property), name
            continue
        mine = inspect.signature(asynchronous[name]).parameters
        theirs = inspect.signature(method).parameters
        assert list(mine) == list(theirs), name
        for parameter in theirs.values():
            assert mine[parameter.name].default == parameter.default, name
            assert mine[parameter.name].kind == parameter.kind, name


def test_the_default_thread_pool_is_not_used_and_the_event_loop_never_waits() -> None:
    event = threading.Event()
    engine, _ = slow_engine(event)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        asynchronous = AsyncEngine(engine=engine)
        await asynchronous.astart()
        calls = [
            asyncio.create_task(call)
            for number in range(60)
            for call in (
                asynchronous.embed([f"the cat {number} {text}" for text in range(20)], batch_size=5),
                asynchronous.embed([f"the dog {number}"]),
            )
        ]
        longest, then = 0.0, time.monotonic()
        while engine.stats().open_texts < 60 * 21:
            await asyncio.sleep(0.001)
            longest, then = max(longest, time.monotonic() - then), time.monotonic()
            assert longest < SECONDS
        event.set()
        vectors = await asyncio.gather(*calls)
        assert [len(each) for each in vectors] == [20, 1] * 60
        await asynchronous.astop()

    asyncio.run(run())


def test_async_streams_take_what_is_asynchronous_and_give_what_engine_gives() -> None:
    texts = [f"the cat {number}" for number in range(700)]

    async def slowly() -> AsyncIterator[str]:
        for text in texts:
            await asyncio.sleep(0)
            yield text

    async def run() -> None:
        async with AsyncEngine(engine=engine_of([])) as engine:
            expected = await engine.embed(texts)
            for source in (slowly(), texts, iter(texts)):
                vectors = [vector async for vector in engine.stream(source, batch_size=100)]
                np.testing.assert_array_equal(vectors, expected)
            assert [len(result.tokens) async for result in engine.results(slowly(), batch_size=300)] == [300, 300, 100]
            assert (await engine.similarity(expected[:2], expected[:3])).shape == (2, 3)
            assert engine.stats().counters.texts >= 700

            async def wrong() -> AsyncIterator[Any]:
                yield "a"
                yield 3

            with pytest.raises(InputError, match="text 1 is of type int"):
                _ = [vector async for vector in engine.stream(wrong())]

    asyncio.run(run())


# -- cancelled and interrupted -------------------------------------------------------------------------------------------


def test_cancelling_a_call_of_an_async_engine_drops_everything_that_waits() -> None:
    event = threading.Event()
    engine, device = slow_engine(event)

    async def run() -> None:
        asynchronous = AsyncEngine(engine=engine)
        await asynchronous.astart()
        texts = [f"the cat {number}" for number in range(4000)]

        async def stream() -> None:
            async for _ in asynchronous.stream(iter(texts)):
                pass

        for call in (asynchronous.embed(texts), asynchronous.embed(texts[:200]), stream()):
            task = asyncio.create_task(call)
            await asyncio.to_thread(until, lambda: engine.stats().depth.texts >= 150)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            stats = engine.stats()
            assert (stats.open_texts, stats.depth.texts) == (0, 0)
        event.set()
        await asynchronous.embed(["the dog"])
        assert sum(len(batch.slots) for batch in device.batches) < 60  # what the device had begun
        await asynchronous.astop()

    asyncio.run(run())


def test_cancelling_a_stream_whose_source_is_slow_raises_cancelled_error_at_once_and_closes_the_source() -> None:
    closed = threading.Event()
    release = threading.Event()

    def source() -> Iterator[str]:
        try:
            yield from (f"the cat {number}" for number in range(300))
            release.wait(SECONDS)
            yield "late"
        finally:
            closed.set()

    async def run() -> None:
        async with AsyncEngine(engine=engine_of([])) as engine:

            async def consume() -> None:
                async for _ in engine.stream(source()):
                    pass

            for _ in range(3):
                task = asyncio.create_task(consume())
                await asyncio.sleep(0.2)
                begun = time.monotonic()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert time.monotonic() - begun < 5
                release.set()
                assert await asyncio.to_thread(closed.wait, SECONDS)
                release.clear()
                closed.clear()

    asyncio.run(run())


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT to itself")
@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_leaves_nothing_in_the_queue() -> None:
    event = threading.Event()
    engine, _ = slow_engine(event)
    with engine:
        for call in (
            lambda: engine.embed([f"the cat {number}" for number in range(200)]),
            lambda: engine.embed([f"the cat {number}" for number in range(2000)]),
            lambda: list(engine.stream(f"the cat {number}" for number in range(2000))),
        ):
            with pytest.raises(KeyboardInterrupt):
                interrupted(call)
            stats = engine.stats()
            assert (stats.open_texts, stats.depth.texts) == (0, 0)
        event.set()
        assert engine.embed(["the cat"]).shape == (1, SPEC.width)


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT to itself")
@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_while_loading_closes_what_was_loaded_and_the_next_start_works() -> None:
    devices: list[FakeDevice] = []
    loading, go_on = threading.Event(), threading.Event()

    def components(_settings: Settings, stopping: threading.Event) -> EngineComponents:
        loading.set()
        assert go_on.wait(SECONDS)
        assert stopping.is_set() == (not devices)
        devices.append(FakeDevice(width=SPEC.width, shapes=SMALL_SHAPES))
        return EngineComponents(spec=SPEC, tokenizer=RequestTokenizer(SPEC), device=devices[-1])

    def interrupt() -> None:
        loading.wait(SECONDS)
        interrupt_main_thread()

    engine = Engine(settings=Settings(), components=components)
    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        engine.start()
    interrupter.join()
    assert engine.state == "new"
    go_on.set()
    until(lambda: devices and devices[0].closed)
    assert engine.embed(["a"]).shape == (1, SPEC.width)
    engine.stop()


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.3])
def test_an_interrupt_while_loading_never_aborts_the_process(seconds: float) -> None:
    program = f"from npu_proxy import Engine\nprint(1, flush=True)\nEngine({str(golden('mean')[0])!r}).embed(['a'])\n"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    assert process.wait(SECONDS) in (0, 1, -signal.SIGINT)
    process.stdout.close()


# -- forgotten -----------------------------------------------------------------------------------------------------------


def test_an_engine_that_goes_out_of_scope_ends_its_threads_and_closes_its_device() -> None:
    devices: list[FakeDevice] = []
    gc.collect()
    before = own_threads()
    for _ in range(3):
        engine = engine_of(devices)
        engine.embed(["the cat"])
        asynchronous = AsyncEngine(engine=engine)
        del engine, asynchronous
        gc.collect()
    until(lambda: all(device.closed for device in devices))
    until(lambda: own_threads() == before)
    assert len(devices) == 3


@pytest.mark.skipif(sys.platform == "win32", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent_however_it_ends(number: signal.Signals) -> None:
    program = (
        "import itertools\n"
        "from npu_proxy import Engine\n"
        "if __name__ == '__main__':\n"
        f"    engine = Engine({str(golden('mean')[0])!r})\n"
        "    for index, _ in enumerate(engine.stream((f'the cat {n}' for n in itertools.count()), parallel=2)):\n"
        "        if index == 600:\n"
        "            print('running', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        children = [int(child) for child in subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()]
        assert len(children) >= 2
        process.send_signal(number)
        process.wait(SECONDS)
        until(lambda: not any(is_running(child) for child in children))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(SECONDS)
        assert process.stdout is not None
        process.stdout.close()


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
