"""Slices of text tables hold the records that the csv module finds in the whole file, however the file is cut."""

import csv
import gzip
import hashlib
import io
import random
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import storage
from pipelines.corpora import Bad
from pipelines.corpora import _text_records as scan
from pipelines.corpora import _text_tables as tables
from pipelines.errors import Refused


def survey(path: Path, layout: str | None = None, columns: list[str] | None = None, **options: Any):
    [entry] = storage.list_files(str(path))
    return tables.of_table(entry, "", layout or tables.layout_of(path.name), columns, **options)


def read_all(path: Path, *args: Any, **options: Any) -> list[dict[str, Any] | Bad]:
    found = []
    for piece in survey(path, *args, **options):
        units = list(tables.read_table(piece, lambda _: True))
        assert [unit for unit, _, _ in units] == list(range(piece.stop - piece.start))
        found += [record for _, record, _ in units]
    return found


def by_csv(path: Path, delimiter: str = ",", quoting: int = csv.QUOTE_MINIMAL) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file, delimiter=delimiter, quoting=quoting))


def reasons(found: list[dict[str, Any] | Bad]) -> list[str | None]:
    return [one.reason if isinstance(one, Bad) else None for one in found]


def written(path: Path, rows: list[list[str]], ending: str = "\r\n") -> Path:
    with open(path, "w", newline="") as file:
        # With one-character line ends the writer leaves the other line ends unquoted unless it quotes all.
        quoting = csv.QUOTE_MINIMAL if ending == "\r\n" else csv.QUOTE_ALL
        csv.writer(file, lineterminator=ending, quoting=quoting).writerows(rows)
    return path


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("slice_bytes", [1, 40, 1 << 20])
@pytest.mark.parametrize("block", [1, 7, 1 << 20])
@pytest.mark.parametrize("bom", [b"", scan.BOM])
def test_slices_agree_with_the_csv_module(tmp_path, monkeypatch, ending, slice_bytes, block, bom):
    """Fields with quotes, delimiters and every line end inside; blocks and slices are cut inside all of them."""
    monkeypatch.setattr(scan, "BLOCK_BYTES", block)
    draw = random.Random(3)
    fields = ["", "a", 'say "x"', "two\nlines", "two\r\nlines", "cr\rcr", ",", '"', '""', "né", "\n", "end\n"]
    rows = [[draw.choice(fields) for _ in range(3)] for _ in range(60)]
    path = written(tmp_path / "x.csv", [["a", "b", "c"], *rows], ending)
    path.write_bytes(bom + path.read_bytes())
    found = read_all(path, slice_bytes=slice_bytes)
    assert found == by_csv(path)
    assert len(found) == 60
    assert (len(survey(path, slice_bytes=slice_bytes)) > 10) == (slice_bytes < 100)


@pytest.mark.parametrize("block", [1, 5, 4096])
@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_random_bytes_are_cut_as_the_csv_module_cuts_them(tmp_path, monkeypatch, block, delimiter):
    """Stray quotes, quotes inside fields, blank lines, lone CRs: whatever quotes do, the records are the same."""
    monkeypatch.setattr(scan, "BLOCK_BYTES", block)
    draw, compared = random.Random(1), 0
    for turn in range(300):
        body = "".join(draw.choice(["a", " ", delimiter, '"', '"', "\n", "\r", "\r\n", "é"]) for _ in range(30))
        text = f"x{delimiter}y\n{body}\n"
        path = tmp_path / f"{turn}.csv"
        path.write_bytes(text.encode())
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=False)
        next(reader)
        expected = [row for row in reader if row]
        if not _ends_closed(text, delimiter):
            continue
        layout = "csv" if delimiter == "," else "tsv"
        for slice_bytes in (1, 1 << 20):
            found = read_all(path, layout, quoted=True, slice_bytes=slice_bytes)
            assert len(found) == len(expected)
            for ours, theirs in zip(found, expected, strict=True):
                if len(theirs) == 2:
                    assert ours == dict(zip("xy", theirs, strict=True))
                else:
                    assert isinstance(ours, Bad)
                    assert "fields than the header" in ours.reason
        compared += 1
    assert compared > 150


def _ends_closed(text: str, delimiter: str) -> bool:
    """Whether no quote is open at the end: a further record is then one of its own."""
    rows = list(csv.reader(io.StringIO(text + "LAST\n", newline=""), delimiter=delimiter))
    return rows[-1] == ["LAST"]


def test_a_table_of_several_slices_counts_on(tmp_path):
    path = written(tmp_path / "x.csv", [["n"], *[[str(n)] for n in range(100)]])
    slices = survey(path, slice_bytes=50)
    assert [piece.start for piece in slices][1:] == [piece.stop for piece in slices][:-1]
    assert (slices[0].start, slices[-1].stop) == (0, 100)
    assert all(piece.bytes <= 50 for piece in slices)
    assert len(path.read_bytes()) - len(b"n\r\n") == sum(piece.bytes for piece in slices)


def test_only_wanted_records_come_and_only_the_columns_asked_for(tmp_path):
    path = written(tmp_path / "x.csv", [["a", "b"], ["1", "2"], ["3", "4"], ["5", "6"]])
    [piece] = survey(path, columns=["b"])
    data = b"3,4\r\n"
    assert list(tables.read_table(piece, lambda unit: unit == 1)) == [(1, {"b": "4"}, hashlib.sha256(data).digest())]


def test_a_missing_column_is_refused_naming_those_there_are(tmp_path):
    path = written(tmp_path / "x.csv", [["smiles", "label"], ["C", "1"]])
    with pytest.raises(Refused, match=r"no column 'smile'; did you mean 'smiles'\? Allowed: label, smiles"):
        survey(path, columns=["smile"])
    pq.write_table(pa.table({"smiles": ["C"], "label": [1]}), tmp_path / "x.parquet")
    with pytest.raises(Refused, match=r"no column 'text'; allowed: label, smiles"):
        survey(tmp_path / "x.parquet", columns=["text"])
    with pytest.raises(Refused, match=r"has 2 columns 'a'"):
        survey(written(tmp_path / "y.csv", [["a", "a"], ["C", "1"]]), columns=["a"])


def test_without_a_header_columns_are_numbered(tmp_path):
    path = written(tmp_path / "x.csv", [["3", "one"], ["4", "two"]])
    assert read_all(path, columns=["column_2"], header=False) == [{"column_2": "one"}, {"column_2": "two"}]


def test_tsv_has_no_quotes_unless_told(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text('id\ttitle\n1\t"Great" Cats\n2\t"open\n3\t"a\tb\n')
    assert read_all(path) == [
        {"id": "1", "title": '"Great" Cats'},
        {"id": "2", "title": '"open'},
        Bad("x.tsv/2", "it has more fields than the header"),
    ]
    path.write_text('id\ttitle\n1\t"two\nlines"\n')
    assert read_all(path, quoted=True) == [{"id": "1", "title": "two\nlines"}]


def test_bad_records_are_reported_one_by_one(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b"a,b\n1,2\n\xff\xfe,2\n1\n1,2,3\n\n3,4")
    assert read_all(path) == [
        {"a": "1", "b": "2"},
        Bad("x.csv/1", "not UTF-8 text"),
        Bad("x.csv/2", "it has fewer fields than the header"),
        Bad("x.csv/3", "it has more fields than the header"),
        {"a": "3", "b": "4"},
    ]


@pytest.mark.parametrize("block", [3, 64, 1 << 20])
def test_a_quote_that_is_never_closed_costs_one_line(tmp_path, monkeypatch, block):
    monkeypatch.setattr(scan, "BLOCK_BYTES", block)
    path = tmp_path / "x.csv"
    path.write_bytes(b'a,b\n1,2\n3,"4\n5,6\n7,8\n')
    for slice_bytes in (1, 1 << 20):
        found = read_all(path, slice_bytes=slice_bytes)
        assert found == [
            {"a": "1", "b": "2"},
            Bad("x.csv/1", tables.TOO_LONG),
            {"a": "5", "b": "6"},
            {"a": "7", "b": "8"},
        ]


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("block", [1, 16, 100, 4096])
@pytest.mark.parametrize("layout", ["csv", "lines"])
def test_a_record_over_the_bound_is_bad_and_the_next_one_is_read(tmp_path, monkeypatch, layout, block, ending):
    monkeypatch.setattr(scan, "MOST_RECORD_BYTES", 50)
    monkeypatch.setattr(scan, "BLOCK_BYTES", block)
    long, quoted = b"x" * 200, b'"' + (b"y" * 20 + ending) * 5 + b'"'
    lines = [b"text", b"one", long, b"two", long]
    path = tmp_path / "x.csv"
    path.write_bytes(ending.join([*lines, b"end", *([quoted] if layout == "csv" else [])]))
    for slice_bytes in (1, 60, 1 << 20):
        found = read_all(path, layout, slice_bytes=slice_bytes)
        head = [] if layout == "csv" else [None]
        assert reasons(found)[: 5 + len(head)] == [*head, None, tables.TOO_LONG, None, tables.TOO_LONG, None]
        # Of the long quoted record the first line is bad; the others are read as what they look like.
        assert len(found) == (11 if layout == "csv" else 6)


def test_a_bomb_is_one_bad_record(tmp_path):
    """40 MiB of one line in 40 KiB of gzip, between two good records."""
    path = tmp_path / "x.csv.gz"
    path.write_bytes(gzip.compress(b"text\nbefore\n" + b"0" * (40 << 20) + b"\nafter\n"))
    assert path.stat().st_size < 1 << 16
    found = read_all(path)
    assert reasons(found) == [None, tables.TOO_LONG, None]
    assert found[-1] == {"text": "after"}
    assert reasons(read_all(path, "document")) == [f"more than {scan.MOST_RECORD_BYTES:,} bytes"]


def noise(rows: int) -> list[list[str]]:
    draw = random.Random(0)
    return [["n", "noise"], *[[str(n), f"{draw.getrandbits(200):x}"] for n in range(rows)]]


def test_gzip_of_several_members_and_slices_reads_as_the_plain_file(tmp_path, monkeypatch):
    plain = written(tmp_path / "x.csv", noise(5000))
    data = plain.read_bytes()
    path = tmp_path / "x.csv.gz"
    path.write_bytes(b"".join(gzip.compress(data[n : n + 99_990]) for n in range(0, len(data), 99_990)) + b"\0" * 9)
    assert read_all(path, slice_bytes=10_000) == by_csv(plain)
    slices = survey(path, slice_bytes=10_000)
    assert 4 <= len(slices) <= 16
    monkeypatch.setattr(scan, "BLOCK_BYTES", 1000)
    assert survey(path, slice_bytes=10_000) == slices


def test_of_a_cut_off_gzip_all_that_can_be_read_is_read_and_the_rest_is_one_bad_unit(tmp_path):
    plain = written(tmp_path / "x.csv", noise(5000))
    whole = gzip.compress(plain.read_bytes())
    path = tmp_path / "x.csv.gz"
    path.write_bytes(whole[: len(whole) // 2])
    readable = zlib.decompressobj(31).decompress(path.read_bytes()).count(b"\n") - 1
    for slice_bytes in (1000, 1 << 20):
        found = read_all(path, slice_bytes=slice_bytes)
        assert found == [*by_csv(plain)[:readable], Bad(f"x.csv.gz/{readable}", "the gzip stream is cut off")]
    assert 2000 < readable < 3000


def test_a_damaged_gzip_is_reported(tmp_path):
    data = bytearray(gzip.compress(written(tmp_path / "x.csv", noise(200)).read_bytes()))
    path = tmp_path / "x.csv.gz"
    path.write_bytes(bytes(data[:-8]) + b"\0" * 4 + bytes(data[-4:]))
    found = read_all(path)
    assert len(found) == 201
    assert [reason for reason in reasons(found) if reason] == [
        "the gzip stream is damaged: Error -3 while decompressing data: incorrect data check"
    ]
    path.write_bytes(b"a,b\n1,2\n")
    [reason] = reasons(read_all(path))
    assert reason == (
        "could not be read: the gzip stream is damaged: Error -3 while decompressing data: incorrect header check"
    )


def test_files_that_are_no_tables_are_one_bad_unit(tmp_path):
    cases = {
        "empty.csv": (b"", "the file is empty"),
        "bom.csv": (scan.BOM, "the file is empty"),
        "utf16.csv": ("a,b\n1,2\n".encode("utf-16"), "its first record is no header of a table"),
        "packed.csv": (gzip.compress(b"a,b\n1,2\n"), "its first record is no header of a table"),
        "empty.csv.gz": (b"", "the file is empty"),
    }
    for name, (data, reason) in cases.items():
        (tmp_path / name).write_bytes(data)
        assert read_all(tmp_path / name) == [Bad(name, reason)]
    for name, data in {"empty.parquet": b"", "text.parquet": b"a,b\n1,2\n", "cut.parquet": b"PAR1xxxx"}.items():
        (tmp_path / name).write_bytes(data)
        [found] = read_all(tmp_path / name)
        assert isinstance(found, Bad)
        assert found.reason.startswith("could not be read: ")
    (tmp_path / "header.csv").write_text("a,b\n")
    assert survey(tmp_path / "header.csv") == []


def test_a_dangling_link_and_a_file_that_vanished_are_bad(tmp_path):
    (tmp_path / "link.csv").symlink_to(tmp_path / "nowhere")
    [entry] = storage.list_files(str(tmp_path))
    assert [piece.meta["layout"] for piece in tables.of_table(entry, "", "csv")] == ["unreadable"]
    path = written(tmp_path / "x.csv", [["a"], ["1"], ["2"]])
    [piece] = survey(path)
    path.unlink()
    assert (
        reasons([found for _, found, _ in tables.read_table(piece, lambda _: True)])
        == ["could not be read: Refused"] * 2
    )
    path.write_text("a\n1\n")
    assert reasons([found for _, found, _ in tables.read_table(piece, lambda _: True)])[-1] == (
        "the file ends before this record"
    )


def test_every_line_is_a_record_of_a_text_file(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(scan.BOM + b'one "\r\n\ntwo, three\rfour')
    for slice_bytes in (1, 1 << 20):
        found = read_all(path, slice_bytes=slice_bytes)
        assert found == [{"text": line} for line in ('one "', "", "two, three", "four")]


@pytest.mark.parametrize("packed", [False, True])
def test_a_document_is_one_unit(tmp_path, packed):
    path = tmp_path / ("x.txt.gz" if packed else "x.txt")
    data = scan.BOM + "née\n\nline".encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    [piece] = survey(path, "document")
    assert list(tables.read_table(piece, lambda _: True)) == [
        (0, {"text": "née\n\nline"}, hashlib.sha256(data).digest())
    ]
    assert list(tables.read_table(piece, lambda _: False)) == []
    path.write_bytes(gzip.compress(b"\xff") if packed else b"\xff")
    assert read_all(path, "document") == [Bad(path.name, "not UTF-8 text")]
    if packed:
        path.write_bytes(gzip.compress(data)[:-9])
        assert read_all(path, "document") == [Bad(path.name, "the gzip stream is cut off")]


def test_parquet_is_cut_by_row_groups_and_inside_large_ones(tmp_path):
    rows = [{"n": n, "text": None if n % 7 == 0 else f"t{n}", "x": n / 4} for n in range(5000)]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2000)
    assert read_all(path) == rows
    assert [(piece.start, piece.stop) for piece in survey(path)] == [(0, 2000), (2000, 4000), (4000, 5000)]
    small = survey(path, slice_bytes=10_000)
    assert len(small) > 6
    assert read_all(path, columns=["text"], slice_bytes=10_000) == [{"text": row["text"]} for row in rows]


def test_parquet_text_that_is_no_utf8_costs_one_record(tmp_path):
    data = pa.array([b"good", b"\xff", b"fine"])
    text = pa.StringArray.from_buffers(3, data.buffers()[1], data.buffers()[2])
    pq.write_table(pa.table({"text": text}), tmp_path / "x.parquet")
    assert read_all(tmp_path / "x.parquet") == [
        {"text": "good"},
        Bad("x.parquet/1", "not UTF-8 text"),
        {"text": "fine"},
    ]


def test_a_damaged_row_group_is_bad_from_there_on(tmp_path):
    path = tmp_path / "x.parquet"
    table = pa.table({"n": pa.array(range(6000), pa.int64())})
    pq.write_table(table, path, row_group_size=3000, compression="gzip", use_dictionary=False)
    data = bytearray(path.read_bytes())
    middle = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data[middle + 40 : middle + 400] = b"\x55" * 360
    path.write_bytes(bytes(data))
    found = read_all(path)
    assert found[:3000] == [{"n": n} for n in range(3000)]
    assert len(found) == 6000
    assert all(isinstance(one, Bad) for one in found[3000:])


def test_layouts_go_by_the_name():
    names = ["a.CSV", "b.tsv.gz", "c.txt", "d.parquet", "e.csv.gz", "f.json", "g.gz", "h.parquet.gz"]
    assert [tables.layout_of(name) for name in names] == ["csv", "tsv", "lines", "parquet", "csv", None, None, None]
