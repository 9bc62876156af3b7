"""Download a model's files from the Hugging Face hub, or from the mirror of it that HF_ENDPOINT names.

The hub's own library says where the hub is, and sends the user's token; the requests are made here, because a listing, a size or a
redirect may be false: a file has exactly the bytes that the listing states, a model has a limit, and redirects stay with the hub.
"""

from __future__ import annotations

import hashlib
import ipaddress
import socket
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import msgspec

from npu_proxy.errors import PullError
from npu_proxy.models.fingerprint import file_sha256
from npu_proxy.system import private_folder

_STORES = ("huggingface.co", "hf.co")
"""Where the hub keeps large files, on hosts below these names."""
_MOST_REDIRECTS = 5
_LARGEST_LISTING = 32 << 20
_LARGEST_PLAIN = 100 << 20
"""Bytes of a file whose size the listing does not state."""
_WAIT_SECONDS, _LEAST_RATE, _GRACE_SECONDS = 30.0, 10_000, 60.0
"""Seconds to wait for a connection or for bytes; bytes per second that must arrive on average after the grace period."""
_BLOCK = 1 << 20

Select = Callable[[Collection[str]], Sequence[str]]
OnBytes = Callable[[str, int, int | None], None]
"""Receives a file's path, the bytes of it that have arrived, and its size if it is known."""


class HubUnavailableError(Exception):
    """The hub cannot be reached, or does not have the model."""


class _Lfs(msgspec.Struct):
    sha256: str


class _File(msgspec.Struct):
    """A file of a repository. size: bytes. lfs: the checksum of a large file. blob_id: git's hash of a small one."""

    rfilename: str
    size: int | None = None
    lfs: _Lfs | None = None
    blob_id: str | None = msgspec.field(name="blobId", default=None)


class _Listing(msgspec.Struct):
    sha: str
    siblings: list[_File] = []


_DECODER = msgspec.json.Decoder(_Listing)


def download(
    name: str, revision: str | None, folder: Path, select: Select, most_bytes: int, on_bytes: OnBytes
) -> Mapping[str, Path]:
    """Download the files that ``select`` chooses from those of a repository into ``folder``; a later call continues.

    Raises HubUnavailableError, or PullError if a file is not what the listing states, or if all together exceed ``most_bytes``.
    """
    from huggingface_hub import constants

    if "/" not in name:
        raise HubUnavailableError("names on the hub have the form `org/name`")
    if constants.HF_HUB_OFFLINE:
        raise HubUnavailableError("HF_HUB_OFFLINE is set")
    at = f"/revision/{quote(revision, safe='')}" if revision else ""
    content = b"".join(_read(f"{constants.ENDPOINT}/api/models/{quote(name)}{at}?blobs=true", 0, _LARGEST_LISTING))
    try:
        listing = _DECODER.decode(content)
    except (ValueError, RecursionError) as error:
        raise HubUnavailableError(f"the hub's listing is not understood: {error}") from error
    files = {file.rfilename: file for file in listing.siblings}
    chosen = [files[path] for path in select(files)]
    total = sum(file.size or 0 for file in chosen)
    if total > most_bytes:
        limit = f"at most {most_bytes / 1e9:g} GB are allowed (`max_pull_gb`)"
        raise PullError(f"{name} has {total / 1e9:.1f} GB; {limit}")
    left, found = most_bytes, dict[str, Path]()
    for file in chosen:
        url = f"{constants.ENDPOINT}/{quote(name)}/resolve/{quote(listing.sha, safe='')}/{quote(file.rfilename)}"
        target = folder / hashlib.sha256(listing.sha.encode()).hexdigest()[:16] / file.rfilename
        most = min(left, _LARGEST_PLAIN if file.size is None else file.size)
        try:
            _fetch(url, file, target, most, lambda received, file=file: on_bytes(file.rfilename, received, file.size))
        except OSError as error:
            raise PullError(f"{file.rfilename} cannot be written: {error.strerror or error}") from error
        found[file.rfilename] = target
        left -= target.stat().st_size
    return found


def _fetch(url: str, file: _File, target: Path, most_bytes: int, on_bytes: Callable[[int], None]) -> None:
    """Download one file, or the rest of it, and check its size and checksum. Raises PullError."""
    if not target.exists():
        private_folder(target.parent)
        partial = target.with_name(f"{target.name}.partial")
        start = partial.stat().st_size if partial.exists() else 0
        start = start if start < most_bytes else 0
        with partial.open("ab" if start else "wb") as written:
            for block in _read(url, start, most_bytes):
                if block is None:  # the server begins anew
                    written.truncate(0)
                    continue
                written.write(block)
                on_bytes(written.tell())
        partial.replace(target)
    size = target.stat().st_size
    wrong = file.size is not None and size != file.size
    if file.lfs is not None:
        wrong = wrong or file_sha256(target) != file.lfs.sha256
    elif file.blob_id is not None:
        wrong = wrong or _git_hash(target, size) != file.blob_id
    if wrong:
        target.unlink()
        raise PullError(f"{file.rfilename} is not what the hub's listing states ({size} bytes); pull again")


def _git_hash(path: Path, size: int) -> str:
    digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


# -- requests ------------------------------------------------------------------------------------------------------------


def _read(url: str, start: int, most_bytes: int) -> Generator[Any]:
    """Yield the bytes at ``url`` from ``start`` on, following redirects; None first if the server sends them from the beginning.

    most_bytes: of the whole file; PullError if there are more.
    """
    for _ in range(_MOST_REDIRECTS):
        with _answer(url, start) as response:
            if response.is_redirect:
                url = _next(url, response.headers.get("location", ""))
                continue
            if response.status_code not in (200, 206):
                raise HubUnavailableError(f"the hub answers {response.status_code} for {urlsplit(url).path}")
            if start and not response.headers.get("content-range", "").startswith(f"bytes {start}-"):
                if response.status_code == 206:
                    raise HubUnavailableError("the hub sends another part of a file than was asked for")
                start = 0
                yield None
            began, received = time.monotonic(), start
            for block in response.iter_raw():
                received += len(block)
                if received > most_bytes:
                    raise PullError(f"{urlsplit(url).path} has more than the {most_bytes} bytes that were stated")
                yield block
                seconds = time.monotonic() - began
                if received < most_bytes and seconds > _GRACE_SECONDS and received - start < _LEAST_RATE * seconds:
                    raise HubUnavailableError(f"the hub sends less than {_LEAST_RATE} bytes per second; pull again to continue")
            return
    raise HubUnavailableError("the hub redirects too often")


@contextmanager
def _answer(url: str, start: int) -> Generator[Any]:
    """The response to a request; the user's token goes to the hub alone."""
    from huggingface_hub import constants, get_session, utils

    own = urlsplit(url).netloc == urlsplit(constants.ENDPOINT).netloc
    headers: dict[str, str] = utils.build_hf_headers() if own else {}
    headers |= {"accept-encoding": "identity"} | ({"range": f"bytes={start}-"} if start else {})
    try:
        with get_session().stream("GET", url, headers=headers, follow_redirects=False, timeout=_WAIT_SECONDS) as response:
            yield response
    except (HubUnavailableError, PullError):
        raise
    except Exception as error:  # the hub's library has changed its HTTP library, and with it the classes of errors
        if not type(error).__module__.startswith("http") and not isinstance(error, OSError | ValueError):
            raise
        raise HubUnavailableError(f"the hub cannot be reached ({str(error).splitlines()[0] if str(error) else error!r})") from error


def _next(url: str, location: str) -> str:
    """Where a redirect leads. Raises PullError if that is not the hub, one of its stores, or the mirror that the user named."""
    from huggingface_hub import constants

    target = urljoin(url, location)
    endpoint, parts = urlsplit(constants.ENDPOINT), urlsplit(target)
    host = (parts.hostname or "").lower().rstrip(".")
    if parts.netloc == endpoint.netloc and parts.scheme == endpoint.scheme:
        return target
    names = (*_STORES, (endpoint.hostname or "").lower())
    if parts.scheme != "https" or not any(host == name or host.endswith(f".{name}") for name in names) or _is_private(host):
        raise PullError(f"the hub redirects to {host[:100] or 'nowhere'}, which is not one of its stores")
    return target


def _is_private(host: str) -> bool:
    """Whether a host has an address that is not public; False if it is not known here, where a proxy may know it."""
    try:
        addresses = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return not all(ipaddress.ip_address(str(address).partition("%")[0]).is_global for address in addresses)
