"""The projection is arithmetic, and the input that is made up for a kind is what the kind reads."""

from pathlib import Path

import pytest

from tests.benchmarks.bench_kinds import measure, project


def test_a_billion_rows_by_hand() -> None:
    """4,096 bytes a row are 4.096 TB: 61,036 ranges of 64 MiB, 30,518 shards of 128 MiB in 8 parts of 16 MiB each."""
    made = project(1000, 4_096_000, 4_096_000, requests=4_096_000 / 2**26, seconds=0.036)
    assert made.core_hours == pytest.approx(10)
    assert made.gets == 61_036
    assert made.puts == 30_518 * (1 + 8 + 1) + 2 * 15_259
    assert project(1000, 4_096_000, 4_096_000, requests=500, seconds=1.0).gets == 500_000_000


@pytest.mark.parametrize(("kind", "rows"), [("images", 100), ("vectors", 7500)])
def test_made_up_files_are_read_whole(kind: str, rows: int, tmp_path: Path) -> None:
    speed = measure(kind, tmp_path, quick=True)
    assert (speed.rows, speed.units) == (rows, rows)
    assert speed.bytes_out > 0
    assert speed.seconds > 0
