"""The worker's end of the mailbox."""

import time

from pipelines.loop import Event
from pipelines.mailbox import Outbox


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
