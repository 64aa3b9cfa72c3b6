"""Both ends of the mailbox."""

import time

import pytest
import ray

from pipelines.errors import Failed
from pipelines.loop import Event
from pipelines.mailbox import Listener, Outbox, mailbox_here
from pipelines.step import Wish


def test_the_mailbox_keeps_only_the_newest_progress():
    class Remote:
        def __init__(self) -> None:
            self.sent: list[Event] = []
            self.put = self

        def remote(self, events: list[Event]) -> None:
            self.sent += events

    mailbox = Remote()
    outbox = Outbox(mailbox, every=1e9)
    outbox.sent = time.monotonic()
    for step in range(5):
        outbox.tell({"kind": "progress", "step": step})
    outbox.tell({"kind": "log", "text": "x"})
    outbox.flush()
    assert [event.get("step") for event in mailbox.sent] == [4, None]


@pytest.mark.usefixtures("ray_instance")
def test_a_checkpoint_that_is_wished_is_wished_once_and_of_no_later_workers():
    mailbox = mailbox_here()

    def answered(outbox: Outbox, kind: str) -> Wish:
        outbox.tell({"kind": kind})
        ray.get(outbox.flush())
        return outbox.wish()

    first = Outbox(mailbox, every=1e9)
    assert answered(first, "log") == Wish.NOTHING
    for _ in range(2):
        saved = mailbox.save.remote(60.0)
        ray.wait([saved], timeout=0.2)
        wishes = [answered(first, "log") for _ in range(3)]
        assert wishes == [Wish.SAVE, Wish.NOTHING, Wish.NOTHING]
        assert not ray.wait([saved], timeout=0)[0]
        assert answered(first, "checkpoint") == Wish.NOTHING
        ray.get(saved, timeout=10)
    assert answered(Outbox(mailbox, every=1e9), "log") == Wish.NOTHING
    ray.kill(mailbox)


def test_metrics_that_the_tracking_store_missed_are_sent_with_the_next_and_it_is_said_once(capsys):
    class Store:
        def __init__(self) -> None:
            self.kept: list = []
            self.well = False

        def log_metrics(self, points: list) -> None:
            if not self.well:
                raise Failed("could not log metrics in MLflow at x: no answer.")
            self.kept.append(list(points))

    store = Store()
    listener = Listener(None, store)
    for step in (1, 2, 3):
        listener._hear({"kind": "metrics", "run_step": step, "metrics": {"loss": 1.0 / step}})
        store.well = step == 3
        listener._track()
    listener._track()
    assert [[step for step, _ in points] for points in store.kept] == [[1, 2, 3]]
    assert capsys.readouterr().err.count("no answer. Training goes on; metrics wait to be sent.") == 1
