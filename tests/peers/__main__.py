"""`python -m tests.peers` (make contracts): how many contracts of each peer hold, and where a peer is wrong.

A contract holds where peer and vqcore give the same. The others are listed with the peer's value and the right one,
both of which a test asserts. Ends with 1 where a test failed: an agreement is broken, or a peer is no longer wrong.
"""

import sys
from collections import defaultdict
from importlib import metadata
from pathlib import Path

import pytest

from tests.peers.verdict import Verdict


class Tally:
    """A plugin that keeps what became of every test, by peer."""

    def __init__(self) -> None:
        self.verdicts: dict[str, Verdict | None] = {}
        self.peer_of: dict[str, str] = {}
        self.outcomes: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self.absent: list[str] = []

    def pytest_itemcollected(self, item: pytest.Function) -> None:
        self.peer_of[item.nodeid] = item.module.PEER
        self.verdicts[item.nodeid] = getattr(item.function, "verdict", None)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.absent.append(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext)
        elif report.failed:
            self.outcomes[report.nodeid], self.reasons[report.nodeid] = "failed", report.longreprtext
            self.peer_of[report.nodeid], self.verdicts[report.nodeid] = report.nodeid, None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome
            self.reasons[report.nodeid] = report.longreprtext

    def lines(self) -> list[str]:
        by_peer: dict[str, list[str]] = defaultdict(list)
        for node in self.outcomes:
            by_peer[self.peer_of[node]].append(node)
        lines = []
        for peer, nodes in sorted(by_peer.items()):
            passed = [node for node in nodes if self.outcomes[node] == "passed"]
            agree = [node for node in passed if self.verdicts[node] is None]
            lines.append(f"{len(agree)} of {len(nodes)} contracts of {peer} {_version(peer)} hold")
            wrong = [verdict for node in passed if (verdict := self.verdicts[node])]
            lines += [f"  peer wrong: {one.wrong}; right, and ours: {one.right}" for one in wrong]
            for node in nodes:
                if self.outcomes[node] != "passed":
                    said = self.reasons[node].strip().splitlines()
                    lines.append(f"  {self.outcomes[node]}: {node.split('::')[-1]}: {said[-1] if said else ''}")
        return lines + [f"not run: {reason.removeprefix('Skipped: ')}" for reason in self.absent]


def _version(peer: str) -> str:
    try:
        return metadata.version(peer)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def main() -> int:
    tally = Tally()
    quiet = ["-p", "no:terminal", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    status = pytest.main([str(Path(__file__).parent), *quiet], plugins=[tally])
    print("\n".join(tally.lines()))
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
