"""Requests in progress, and the distinct texts queued for them."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from npu_proxy.batch import Encoding
from npu_proxy.engine.fair_queue import Rank
from npu_proxy.errors import AnswerTooLargeError, NpuProxyError
from npu_proxy.types import Client, EmbedRequest, OutputType, TextResult


@dataclass(slots=True)
class PendingRequest:
    """A request in progress: collects a result or an error for each of its texts, then calls ``on_done`` exactly once.

    Any thread may deliver results; a second result for the same text is ignored.
    """

    request: EmbedRequest
    deadline: float
    submitted_at: float
    on_done: Callable[[PendingRequest], None]
    rank: Rank = (False, 0)
    """Its order among the requests of its client."""
    cache_keys: Sequence[bytes] = ()
    """The cache key of each text; empty if there is no cache."""
    results: list[TextResult | None] = field(init=False)
    errors: list[NpuProxyError | None] = field(init=False)
    encodings: list[Encoding | None] = field(init=False)
    tokens: int = 0
    """Tokens of its texts so far."""
    numbers: int = 0
    """Numbers in the results so far."""
    cached: int = 0
    """Number of texts whose vectors came from the cache."""
    fallbacks: set[str] = field(init=False, default_factory=set[str])
    """Reasons why the first device of the chain did not compute a text."""
    tokenize_seconds: float = 0.0
    queued_seconds: float = 0.0
    infer_seconds: float = 0.0
    number: int = -1
    """Assigned by PendingRequests."""
    queued_texts: int = 0
    """Number of texts that were passed to the pipeline."""
    parts: list[PendingRequest] = field(init=False, default_factory=list["PendingRequest"])
    """The requests for the chunks of its long texts."""
    _unfinished: int = field(init=False)
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        count = len(self.request.texts)
        self.results = [None] * count
        self.errors = [None] * count
        self.encodings = [None] * count
        self._unfinished = count

    @property
    def client(self) -> Client:
        """Who sent it."""
        return self.request.client

    @property
    def unfinished(self) -> int:
        """Number of texts that have neither a result nor an error yet."""
        return self._unfinished

    def resolve(self, index: int, result: TextResult) -> None:
        """Deliver the result of text ``index``."""
        self._deliver(index, result, None)

    def resolve_cached(self, entries: Iterable[tuple[int, TextResult | None]]) -> None:
        """Deliver cached results, given as (index, entry); entries that are None were not cached."""
        hits = [(index, entry) for index, entry in entries if entry is not None]
        self.cached += len(hits)
        for index, entry in hits:
            self._deliver(index, entry, None)

    def _count(self, result: TextResult) -> AnswerTooLargeError | None:
        """Count the numbers of a result whose size was not known before (see check_output for the others)."""
        match self.request.output_type:
            case OutputType.TOKENS:
                self.numbers += result.vector.size
            case OutputType.SPARSE:
                self.numbers += 2 * len(result.vector)
            case _:
                return None
        return self.too_large(self.numbers)

    def too_large(self, numbers: int) -> AnswerTooLargeError | None:
        """The error of a result with so many numbers; None if it may have as many."""
        most = self.request.most_numbers
        return AnswerTooLargeError(most) if most is not None and numbers > most else None

    def fail(self, index: int, error: NpuProxyError) -> None:
        """Deliver an error for text ``index``."""
        self._deliver(index, None, error)

    def fail_all(self, error: NpuProxyError) -> None:
        """Deliver an error for every unfinished text."""
        for index in range(len(self.results)):
            self._deliver(index, None, error)

    def _deliver(self, index: int, result: TextResult | None, error: NpuProxyError | None) -> None:
        with self._lock:
            if self.results[index] is not None or self.errors[index] is not None:
                return
            exceeded = result is not None and (error := self._count(result)) is not None
            self.results[index], self.errors[index] = None if exceeded else result, error
            self._unfinished -= 1
            last = self._unfinished == 0
        if last:
            on_done, self.on_done = self.on_done, _done  # what it refers to refers to this request and its texts
            on_done(self)
        elif exceeded and error is not None:  # the other texts are not needed
            self.fail_all(error)


def _done(_: PendingRequest) -> None:
    pass


class PendingRequests:
    """The requests in a pipeline and the order of their deadlines. Not thread-safe: the pipeline's lock guards it."""

    def __init__(self) -> None:
        self.texts: int = 0
        """Number of texts of all requests that were passed to the pipeline."""
        self.by_client: Counter[str] = Counter()
        """The same, by the name of the client."""
        self._requests: dict[int, PendingRequest] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._numbers = itertools.count()

    def __bool__(self) -> bool:
        return bool(self._requests)

    def add(self, request: PendingRequest, texts: int) -> bool:
        """Add a request. Returns whether its deadline is now the earliest."""
        request.number, request.queued_texts = next(self._numbers), texts
        self._requests[request.number] = request
        self.texts += texts
        self.by_client[request.client.name] += texts
        heapq.heappush(self._deadlines, (request.deadline, request.number))
        return self._deadlines[0][1] == request.number

    def remove(self, request: PendingRequest) -> bool:
        """Remove a request. Returns whether it was there."""
        if self._requests.pop(request.number, None) is None:
            return False
        self.texts -= request.queued_texts
        self.by_client[request.client.name] -= request.queued_texts
        if not self.by_client[request.client.name]:
            del self.by_client[request.client.name]
        return True

    def all(self) -> list[PendingRequest]:
        """All requests."""
        return list(self._requests.values())

    @property
    def next_deadline(self) -> float:
        """The earliest deadline, in time.monotonic() seconds; infinite if there is none."""
        return self._deadlines[0][0] if self._deadlines else float("inf")

    def expired(self, now: float) -> list[PendingRequest]:
        """The requests whose deadline has passed; each is returned once."""
        expired: list[PendingRequest] = []
        while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][1] not in self._requests):
            request = self._requests.get(heapq.heappop(self._deadlines)[1])
            if request is not None:
                expired.append(request)
        return expired


@dataclass(slots=True, eq=False)
class Job:
    """One distinct text in the queue, and the requests that wait for it (equal texts share a job).

    client, rank: those of the waiting request that is served first.
    """

    encoding: Encoding
    client: Client
    rank: Rank
    queued_at: float
    waiters: list[tuple[PendingRequest, int]]
    started: bool = False

    @property
    def deadline(self) -> float:
        """The latest deadline of the waiting requests."""
        return max(request.deadline for request, _ in self.waiters)

    def wanted(self, now: float) -> bool:
        """Whether any request still waits for this text."""
        return any(request.deadline > now and request.unfinished for request, _ in self.waiters)
