"""The queue before the engine: priorities first, tenants served fairly, first come first served otherwise, and nobody waits forever.

Tenants are balanced by the tokens that were computed for them (virtual token counters, arXiv 2401.00588). Waiting raises a request by one level
of priority every `aging` steps, at most to the most urgent level that waits.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator

from quantkit.runtime.sequence import Sequence


class WaitingQueue:
    """Sequences that wait, by tenant."""

    def __init__(self, *, aging: int = 1000) -> None:
        self.aging = aging
        self._heaps: dict[str, list[tuple[int, int, Sequence]]] = {}
        self._served: dict[str, int] = {}
        self._running: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self._heaps.values()))

    def __iter__(self) -> Iterator[Sequence]:
        return (entry[-1] for heap in self._heaps.values() for entry in heap)

    def push(self, sequence: Sequence) -> None:
        """New, or back after a preemption with its old place in the order."""
        tenant = sequence.tenant
        if tenant not in self._heaps and not self._running.get(tenant):
            active = (self._served.get(t, 0) for t in self._heaps.keys() | self._running.keys())
            self._served[tenant] = max(self._served.get(tenant, 0), min(active, default=0))
        rank = sequence.priority * self.aging + sequence.arrived_at
        heapq.heappush(self._heaps.setdefault(tenant, []), (rank, sequence.arrival, sequence))

    def head(self, now: int) -> Sequence | None:
        """Whose turn it is at step `now`; its level is brought up to date."""
        heads = [heap[0][-1] for heap in self._heaps.values()]
        if not heads:
            return None
        floor = min(s.priority for s in heads)
        for sequence in heads:
            sequence.level = max(floor, sequence.priority - (now - sequence.arrived_at) // self.aging)
        return min(heads, key=lambda s: (s.level, self._served.get(s.tenant, 0), s.arrival))

    def pop(self, sequence: Sequence) -> None:
        """Take the head of its tenant out; it runs now."""
        heap = self._heaps[sequence.tenant]
        assert heap[0][-1] is sequence
        heapq.heappop(heap)
        self.joined(sequence)
        self._drop_if_empty(sequence.tenant)

    def remove(self, sequence: Sequence) -> bool:
        """Take out a sequence wherever it stands; whether it waited here."""
        heap = self._heaps.get(sequence.tenant, [])
        kept = [entry for entry in heap if entry[-1] is not sequence]
        if len(kept) == len(heap):
            return False
        heapq.heapify(kept)
        self._heaps[sequence.tenant] = kept
        self._drop_if_empty(sequence.tenant)
        return True

    def left(self, sequence: Sequence) -> None:
        """A running sequence ended or was preempted."""
        self._running[sequence.tenant] -= 1
        if not self._running[sequence.tenant]:
            del self._running[sequence.tenant]
            self._retire(sequence.tenant)

    def joined(self, sequence: Sequence) -> None:
        """A sequence runs that never waited: a fork."""
        self._running[sequence.tenant] = self._running.get(sequence.tenant, 0) + 1

    def serve(self, tenant: str, num_tokens: int) -> None:
        self._served[tenant] = self._served.get(tenant, 0) + num_tokens

    def _drop_if_empty(self, tenant: str) -> None:
        if not self._heaps[tenant]:
            del self._heaps[tenant]
            self._retire(tenant)

    def _retire(self, tenant: str) -> None:
        """Forget a tenant who is gone and was not ahead of those who are here; one who returns starts level with them anyway."""
        active = self._heaps.keys() | self._running.keys()
        if tenant not in active and self._served.get(tenant, 0) <= min((self._served.get(t, 0) for t in active), default=math.inf):
            self._served.pop(tenant, None)
