"""Where every worker is, so that when one keeps the others waiting the time-out says which, and in what.

Each worker writes its place into the process group's key-value store once a second, on a thread. gloo's own message
names neither a worker nor what was being summed. With NCCL the watchdog ends the process itself, so nothing of this is
said there.
"""

import contextlib
import threading
import time

import torch.distributed as dist

from pipelines.errors import Failed

BEAT = 1.0
"""Seconds between two words of a worker."""
SILENT = 5.0
"""Seconds without one after which a process is called silent."""


class Hung(RuntimeError):
    """A worker kept the others waiting past the process group's time-out. A restart may mend it."""


class Places:
    """This worker's place, told to the others while the context lasts. Alone, it tells nobody."""

    def __init__(self) -> None:
        self.here = "starting"
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._store: dist.Store | None = None

    def __enter__(self) -> "Places":
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # The only store that lives as long as the group and that every worker already reaches.
            group_store = dist.distributed_c10d._get_default_store()
            self._store = dist.PrefixStore("vqray-places", group_store)
            self._thread = threading.Thread(target=self._tell, name="places", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join(2 * BEAT)

    def explained(self, error: RuntimeError) -> RuntimeError:
        """`error`, or if it is a collective that timed out, which workers were missing from it."""
        text = str(error).lower()
        ours = isinstance(error, (Hung, Failed))
        if ours or self._store is None or not ("timed out" in text or "timeout" in text):
            return error
        rank, here = dist.get_rank(), self.here
        others = (self._word_of(other) for other in range(dist.get_world_size()) if other != rank)
        missing = [word for place, silence, word in others if place != here or silence > SILENT]
        who = "; ".join(missing) or "all say they are there: one hangs inside it, or the network does not carry"
        return Hung(f"rank {rank} waited in vain in {here}: {who}.")

    def _word_of(self, rank: int) -> tuple[str | None, float, str]:
        """(place, seconds since it was told, both as words) of another worker."""
        place, silence = self._place_of(rank)
        if place is None:
            return None, silence, f"rank {rank} does not answer"
        if silence > SILENT:
            return place, silence, f"rank {rank} was last heard of {silence:.0f} s ago, in {place}"
        return place, silence, f"rank {rank} is in {place}"

    def _place_of(self, rank: int) -> tuple[str | None, float]:
        """(place, seconds since it was told) of another worker; clocks of machines are taken to agree to seconds."""
        try:
            if self._store is None or not self._store.check([str(rank)]):
                return None, 0.0
            said, _, place = self._store.get(str(rank)).decode().partition(" ")
        except RuntimeError:
            return None, 0.0
        return place, time.time() - float(said)

    def _tell(self) -> None:
        while True:
            # The store goes when its host dies; then nobody asks any more.
            with contextlib.suppress(RuntimeError):
                if self._store is not None:
                    self._store.set(str(dist.get_rank()), f"{time.time()} {self.here}")
            if self._done.wait(BEAT):
                return
