"""An ingest killed at any moment: run again, it completes to the same digest and does only what is missing."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from pipelines import corpora, ingest, storage
from pipelines.ingest import IngestResult
from tests.pipelines import tiny_corpus
from tests.pipelines.tiny_corpus import TinySettings

FILES, LINES, PAUSE = 6, 40, 0.25
ROOT = Path(__file__).parents[2]
DRIVER = """
    import sys, ray
    from pipelines import corpora, ingest
    from tests.pipelines import tiny_corpus
    corpora.load = lambda kind: getattr(tiny_corpus, kind)
    ingest.LEAST_PART_BYTES = 1
    source, out, diary, pause, cpus, *kinds = sys.argv[1:]
    ray.init(address="local", num_cpus=int(cpus), include_dashboard=False, log_to_driver=False,
             object_store_memory=10**8)
    settings = tiny_corpus.TinySettings(diary=diary, pause=float(pause))
    for kind in kinds:
        ingest.ingest(kind, [source], f"{out}/{kind}", settings=settings)
"""

pytestmark = pytest.mark.usefixtures("ray_instance")


class Place(NamedTuple):
    """Where a test's ingests read and write."""

    home: Path

    @property
    def diary(self) -> Path:
        return self.home / "diary"

    @property
    def settings(self) -> TinySettings:
        return TinySettings(diary=str(self.diary), pause=PAUSE)

    def run(self, kind: str, out: Path) -> IngestResult:
        return ingest.ingest(kind, [str(self.home / "source")], str(out), settings=self.settings)

    def start(self, out: Path, cpus: int, *kinds: str) -> subprocess.Popen:
        """A driver of its own, with a Ray of its own; it writes to `out`/<kind>."""
        words = [str(self.home / "source"), str(out), str(self.diary), str(PAUSE), str(cpus), *kinds]
        with open(self.home / "log", "ab") as log:
            command = [sys.executable, "-c", textwrap.dedent(DRIVER), *words]
            return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)

    def reads(self) -> list[int]:
        """Processes that began to read a part, in the order in which they did."""
        marks = [path.name.split(".") for path in self.diary.iterdir() if path.name.startswith("read.")]
        return [int(process) for _, process, *_ in sorted(marks, key=lambda words: int(words[2]))]

    def forget(self) -> None:
        for path in self.diary.iterdir():
            path.unlink()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(corpora, "load", lambda kind: getattr(tiny_corpus, kind))
    monkeypatch.setattr(ingest, "LEAST_PART_BYTES", 1)
    for file in range(FILES):
        lines = [f"group{file}-{n} {n}" for n in range(LINES - file)]
        storage.write_atomic(str(tmp_path / f"source/{file}.txt"), "\n".join([*lines, "bad"]).encode())
    (tmp_path / "diary").mkdir()
    return Place(tmp_path)


def wait_for(what: Callable[[], bool], alive: Callable[[], bool] = lambda: True) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert alive()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def parts_done(out: Path) -> int:
    return len(list((out / "parts").glob("part-*.json")))


def kill_driver(place: Place, kind: str, out: Path, after: int, delay: float) -> int:
    """Kill it when `after` parts were begun and `delay` seconds later; the number of parts that were begun."""
    driver = place.start(out.parent, 2, kind)
    wait_for(lambda: len(place.reads()) > after, lambda: driver.poll() is None)
    time.sleep(delay)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    # Ray's processes end when they miss their driver; until then they may finish what they do.
    wait_for(lambda: not any(is_running(process) for process in place.reads()))
    return len(place.reads())


def kill_worker(place: Place, kind: str, out: Path, after: int, delay: float) -> IngestResult:
    """Kill the worker that began to read a part when `after` were begun before it; what the run itself ends with."""

    def kill() -> None:
        wait_for(lambda: len(place.reads()) > after)
        time.sleep(delay)
        os.kill(place.reads()[after], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        return place.run(kind, out)
    finally:
        killer.join()


def is_running(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def check_moment(place: Place, who: str, kind: str, out: Path, after: int, delay: float, clean: IngestResult) -> None:
    place.forget()
    if who == "worker":
        done = kill_worker(place, kind, out, after, delay)
        # What was killed is read once more; nothing is where it had just finished.
        assert FILES <= len(place.reads()) <= FILES + 1
    else:
        begun = kill_driver(place, kind, out, after, delay)
        missing = FILES - parts_done(out)
        assert not (out / "manifest.json").exists()
        done = place.run(kind, out)
        assert len(place.reads()) == begun + missing
    assert (done.digest, done.rows, done.quarantined) == (clean.digest, clean.rows, FILES)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    reads = len(place.reads())
    again = place.run(kind, out)
    assert (again.skipped, again.digest) == (True, clean.digest)
    assert len(place.reads()) == reads
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert not list(out.rglob(".*")) + list(out.rglob("*.begun"))


def moments(seed: int = 4) -> list[tuple[str, str, int, float]]:
    """Who is killed, of which kind of corpus, after how many parts were begun, and how long into the next."""
    drawn = random.Random(seed)
    kinds = [(who, kind) for who in ("driver", "worker") for kind in ("corpus", "modelled")]
    return [(*kinds[n % 4], drawn.randrange(FILES), PAUSE * drawn.random()) for n in range(10)]


@pytest.mark.slow
def test_killed_at_ten_moments_it_ends_in_the_digest_of_an_undisturbed_run(place: Place, tmp_path: Path) -> None:
    clean = {kind: place.run(kind, tmp_path / "clean" / kind) for kind in ("corpus", "modelled")}
    for number, (who, kind, after, delay) in enumerate(moments()):
        check_moment(place, who, kind, tmp_path / str(number) / kind, after, delay, clean[kind])


def test_a_killed_worker_is_replaced_and_its_part_read_again(place: Place, tmp_path: Path) -> None:
    clean = place.run("corpus", tmp_path / "clean")
    check_moment(place, "worker", "corpus", tmp_path / "out", 2, PAUSE / 2, clean)


@pytest.mark.slow
def test_one_cpu_and_four_make_one_digest_and_a_killed_driver_is_resumed_to_it(place: Place, tmp_path: Path) -> None:
    clean = {kind: place.run(kind, tmp_path / "four" / kind) for kind in ("corpus", "modelled")}
    place.forget()
    driver = place.start(tmp_path / "one", 1, "modelled", "corpus")
    wait_for(lambda: parts_done(tmp_path / "one/corpus") == 2, lambda: driver.poll() is None)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    wait_for(lambda: not any(is_running(process) for process in place.reads()))
    begun, missing = len(place.reads()), FILES - parts_done(tmp_path / "one/corpus")
    assert 0 < missing < FILES
    resumed = place.run("corpus", tmp_path / "one/corpus")
    assert len(place.reads()) == begun + missing
    assert resumed.digest == clean["corpus"].digest
    assert place.run("modelled", tmp_path / "one/modelled").digest == clean["modelled"].digest
    assert len(place.reads()) == begun + missing
