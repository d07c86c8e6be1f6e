"""The processes that torchrun started together: which one this is, its share of the work, what they tell each other.

They talk through torchrun's key-value store, which is of one job alone, as files in a shared folder would not be: what
a killed job left says nothing here. Who waits does so for as long as it takes, and hears when another one has failed.
"""

import heapq
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch.distributed import HashStore, PrefixStore, Store, rendezvous

from cogview.data.ahead import cores

POLL = 0.1  # seconds between two looks at whether another process has said something
_ANSWER = timedelta(minutes=30)  # in which all processes have to be there, and the store to answer


class Ranks:
    """rank: this process, of 0 to count - 1. local: how many of them are on this machine. As a context manager it tells
    the others when this one fails."""

    def __init__(self, rank: int = 0, count: int = 1, local: int = 1, store: Store | None = None):
        self.rank, self.count, self.local = rank, count, local
        self._store = HashStore() if store is None else store

    @classmethod
    def of_environment(cls) -> "Ranks":
        """As torchrun's variables say (RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT); else the only
        process. ValueError where one of them is missing."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        store, rank, count = next(rendezvous("env://", timeout=_ANSWER))
        store = PrefixStore(f"cogview/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        return cls(rank, count, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), store)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is not None and self.count > 1:
            with suppress(RuntimeError):  # the store is gone with the process that kept it
                self._store.set("failed", f"process {self.rank}: {error or kind.__name__}")

    @property
    def first(self) -> bool:
        """Whether this is the process that trains, sums up and speaks."""
        return self.rank == 0

    @property
    def others(self) -> range:
        """For the first process, all but itself."""
        return range(1, self.count)

    def cores(self) -> int:
        """This process's share of the machine's."""
        return max(1, cores() // self.local)

    def share(self, weights: Sequence[int]) -> list[int]:
        """Which of some items are this process's, ascending: the heaviest first, each to who has the least so far."""
        loads = [(0, rank) for rank in range(self.count)]
        mine = []
        for number in sorted(range(len(weights)), key=lambda n: (-weights[n], n)):
            load, rank = loads[0]
            heapq.heapreplace(loads, (load + weights[number], rank))
            if rank == self.rank:
                mine.append(number)
        return sorted(mine)

    def tell(self, name: str, value: Any = None) -> None:
        """Says something, which JSON can hold, to all who want to hear it."""
        self._store.set(f"{name}/{self.rank}", json.dumps(value))

    def hear(self, name: str, rank: int, meanwhile: Callable[[], Any] = lambda: None) -> Any:
        """What another process says under this name, when it does; RuntimeError with the reason when one has failed.
        meanwhile: called while waiting."""
        key = f"{name}/{rank}"
        while not self._store.check([key]):
            if self._store.check(["failed"]):
                raise RuntimeError(self._store.get("failed").decode())
            meanwhile()
            time.sleep(POLL)
        return json.loads(self._store.get(key))

    def counted(self, name: str, more: int = 0) -> int:
        """What all processes together have counted under a name, this one's `more` included."""
        return self._store.add(name, more)
