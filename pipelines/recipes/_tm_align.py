"""TM-scores of pairs of chains by TM-align, with a limit of time: it hangs on some pairs of the public benchmark."""

import importlib.util
import json
import selectors
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from pipelines.errors import Failed, Refused
from pipelines.recipes._structure_chains import Floats

CHILD = Path(__file__).with_name("_tm_child.py")
SHORTEST = 3
"""TM-align needs as many residues."""


class TmAligner:
    """A process that aligns one pair after another; one that takes too long is ended and another is started."""

    def __init__(self, seconds: float, child: Path = CHILD) -> None:
        if importlib.util.find_spec("tmtools") is None:
            raise Refused("TM-scores are computed by tmtools, which is not installed: pip install 'vqray[tmscore]'")
        self.seconds, self.child = seconds, child
        self._process: subprocess.Popen[str] | None = None
        self._works = False

    def mean_score(self, one: Floats, other: Floats) -> float | None:
        """Mean of the two length-normalised TM-scores of CA atoms [L, 3] and [M, 3]; None where time ran out, or where
        the process ended on this pair.

        Raises:
            Failed: the process ended by itself before it had aligned anything.
        """
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"a": one.tolist(), "b": other.tolist()}) + "\n")
            process.stdin.flush()
            with selectors.DefaultSelector() as ready:
                ready.register(process.stdout, selectors.EVENT_READ)
                if not ready.select(self.seconds):
                    self.close()
                    return None
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.close()
            if not self._works:
                raise Failed("the process that runs TM-align ended by itself; see what it printed above.")
            return None
        self._works = True
        first, second = json.loads(line)
        return (float(first) + float(second)) / 2

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            # -I: the folder of the script would come first among the places of modules.
            command = [sys.executable, "-I", str(self.child)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self._process

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __enter__(self) -> "TmAligner":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
