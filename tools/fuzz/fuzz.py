"""Fuzz one reader, guided by its coverage: python tools/fuzz/fuzz.py TARGET [SECONDS]. Needs `pip install atheris`.

Targets and seeds are those of tests/fuzz/targets.py. Inputs that reach new code are kept in .fuzz/TARGET, where the next run
continues. What ends the run is written to .fuzz/TARGET-*: an exception that is not ours, an input that takes more than 512 MB over
its size, or 10 seconds. The fuzzer's own memory grows, so it runs in sessions of a minute.
"""

import os
import resource
import subprocess
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ALLOWED = 512 << 20
LARGEST = 1 << 20
SESSION = 60


def session(name: str, seconds: int) -> None:
    """Fuzz in this process."""
    atheris: Any = import_module("atheris")  # a tool that the tests do not install

    sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("fuzz", "models", "server/apis", "")]
    with atheris.instrument_imports(include=["npu_proxy", "pickletools", "zipfile", "json"]):
        import targets

        from npu_proxy.errors import NpuProxyError

    target, folder = targets.TARGETS[name], ROOT / ".fuzz" / name
    folder.mkdir(parents=True, exist_ok=True)

    def test(content: bytes) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with suppress(NpuProxyError):
            target(content)
        taken = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        if taken > ALLOWED + len(content):
            raise MemoryError(f"{taken >> 20} MB for {len(content)} bytes")

    for number, seed in enumerate(targets.seeds(name)):
        (folder / f"seed-{number}").write_bytes(seed)
        test(seed)
    options = [f"-max_total_time={seconds}", f"-max_len={LARGEST}", "-rss_limit_mb=0", "-timeout=10", "-len_control=20"]
    options += [f"-artifact_prefix={ROOT / '.fuzz' / name}-", "-print_final_stats=1", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *options, str(folder), str(ROOT / "tests" / "fuzz" / "corpus" / name)], test)
    atheris.Fuzz()


def main() -> None:
    """Run sessions until the time is over or something is found."""
    name, seconds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1800
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    end, runs = time.monotonic() + seconds, 0
    while (left := end - time.monotonic()) > 1:
        command = [sys.executable, __file__, name, str(round(min(left, SESSION))), "session"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{name}: found something after {runs} runs\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        runs += int(done.stderr.partition("number_of_executed_units:")[2].split()[0])
        print(f"{name}: {runs} runs, {sum(1 for _ in (ROOT / '.fuzz' / name).iterdir())} inputs kept", flush=True)


if __name__ == "__main__":
    if sys.argv[3:] == ["session"]:
        session(sys.argv[1], int(sys.argv[2]))
    else:
        main()
