"""Streamlines a second on one core: survey, reading, checks and digests here, against nibabel's bare reading.

nibabel (trx-python for .trx) loads whole files; then numpy.interp over arc length, the same resampling as here, and
where it is installed DIPY's compiled one bring each streamline to as many points. Of files made here in the three
formats, or of your own: python -m tests.benchmarks.bench_streamlines --source DIR
"""

import argparse
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np

from pipelines.corpora import Row, streamlines
from pipelines.corpora import _streamline_shapes as shapes
from pipelines.corpora.streamlines import StreamlineSettings
from tests.benchmarks.timing import above, one_thread, paired, ratio
from tests.pipelines.corpora.test_streamline_formats import as_tck, as_trk, as_trx

POINTS, ROUNDS, LEAST = 64, 5, 0.8
COUNT = 20_000
BLOCK = 300
"""About as many as are resampled together here."""
MAKERS = {".trk": as_trk, ".tck": as_tck, ".trx": as_trx}


def run(quick: bool = False, source: str | None = None) -> None:
    """Print streamlines/s and the ratio to each other side, by format."""
    with tempfile.TemporaryDirectory() as scratch, one_thread():
        folders = {"given": Path(source)} if source else made(Path(scratch), COUNT // 20 if quick else COUNT)
        for name, folder in folders.items():
            compare(name, folder, rounds=1 if quick else ROUNDS)


def made(home: Path, count: int) -> dict[str, Path]:
    """A folder with one file for each format, of curves of 20 to 200 points as tractography draws them."""
    random = np.random.default_rng(0)
    lines = []
    for points in random.integers(20, 200, count):
        steps = random.normal(0, 1, 3) + random.normal(0, 0.2, (points, 3)).cumsum(0)
        steps /= np.linalg.norm(steps, axis=1, keepdims=True)
        lines.append((random.normal(0, 20, 3) + steps.cumsum(0)).astype(np.float32))
    for suffix, make in MAKERS.items():
        (home / suffix).mkdir()
        (home / suffix / f"AF{suffix}").write_bytes(make(lines))
    return {suffix: home / suffix for suffix in MAKERS}


def compare(name: str, folder: Path, rounds: int) -> None:
    """One line a reference: the paired ratio of speeds, of which more is better."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in MAKERS]
    sides = {
        "nibabel and numpy.interp": lambda: [by_interp(line) for path in files for line in loaded(path)],
        "nibabel and the resampling here": lambda: [by_blocks(loaded(path)) for path in files],
    }
    try:
        from dipy.tracking.streamline import set_number_of_points
    except ImportError:
        print("DIPY is not installed: its side is left out")
    else:
        sides["nibabel and DIPY"] = lambda: [set_number_of_points(loaded(path), POINTS) for path in files]
    ours, *others = paired(lambda: ingested(folder), *sides.values(), rounds=rounds)
    count = ingested(folder)
    print(f"{name}: {count:,} streamlines, {count / np.median(ours):,.0f}/s here")
    for side, seconds in zip(sides, others, strict=True):
        times = ratio(seconds, ours)
        told = f"{times:>8.1f}{'':>6}" if "DIPY" in side else above(times, LEAST)
        print(f"  {told}  times as fast as {side} ({count / np.median(seconds):,.0f}/s)")


def ingested(folder: Path) -> int:
    """Survey and read as an ingest does; how many streamlines there are."""
    settings = StreamlineSettings(num_points=POINTS, split_by="file")
    found = streamlines.survey([str(folder)], settings)
    outcomes = (one for piece in found.slices for one in streamlines.read(piece, found.context, settings, _every))
    return sum(isinstance(outcome, Row) for _, outcome, _ in outcomes)


def loaded(path: Path) -> nib.streamlines.ArraySequence:
    if path.suffix != ".trx":
        return nib.streamlines.load(path).streamlines
    import trx.trx_file_memmap as trx_python

    # It closes a file by deleting what it mapped.
    file = trx_python.load(str(path))
    lines = nib.streamlines.ArraySequence([np.array(line) for line in file.streamlines])
    file.close()
    return lines


def by_interp(points: np.ndarray) -> np.ndarray:
    steps = np.linalg.norm(np.diff(points.astype(np.float64), axis=0), axis=1)
    way = np.concatenate([[0], np.cumsum(steps)])
    places = np.linspace(0, way[-1], POINTS)
    return np.stack([np.interp(places, way, points[:, axis]) for axis in range(3)], 1).astype(np.float32)


def by_blocks(lines: nib.streamlines.ArraySequence) -> list[np.ndarray]:
    blocks = [list(lines[first : first + BLOCK]) for first in range(0, len(lines), BLOCK)]
    return [shapes.resampled(block, shapes.along(block), POINTS) for block in blocks]


def _every(unit: int) -> bool:
    return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", help="a folder of .trk, .tck and .trx files (default: files made here)")
    run(source=parser.parse_args().source)
