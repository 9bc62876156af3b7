"""Every reader returns, or raises an error of ours, for right inputs, for what fuzzing found (corpus/), and for mutations of both.

tools/fuzz/fuzz.py fuzzes the same targets for as long as one likes.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from targets import TARGETS, seeds

from npu_proxy.errors import NpuProxyError

ODD = [b"9" * 20, b"-1", b"[" * 2000, b"null", b"1e400"]
CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.parametrize("name", TARGETS)
def test_right_inputs_are_read(name: str) -> None:
    for seed in seeds(name):
        if name != "http_body":  # what is right for one route is wrong for another
            TARGETS[name](seed)


def inputs(name: str) -> Iterator[bytes]:
    yield from seeds(name)
    for file in sorted((CORPUS / name).glob("*")):
        yield file.read_bytes()


@pytest.mark.parametrize("name", TARGETS)
def test_what_fuzzing_found_is_read_or_refused(name: str) -> None:
    for content in inputs(name):
        with suppress(NpuProxyError):
            TARGETS[name](content)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutations_are_read_or_refused(name: str, data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(seeds(name))))
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(content)))
        match data.draw(st.integers(0, 3)):
            case 0:
                content[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
            case 1:
                content[at:at] = data.draw(st.binary(max_size=8) | st.sampled_from(ODD))
            case 2:
                del content[at : at + data.draw(st.integers(1, 40))]
            case _:
                content[at:at] = content[at // 2 : at]
    with suppress(NpuProxyError):
        TARGETS[name](bytes(content))
