"""Streamlines of white matter: TrackVis .trk, MRtrix .tck and .trx files, also inside .zip; RAS mm.

A unit is one streamline, resampled to `num_points` at equal distances. A row is one of them (`rows=single`), or a chunk
of `chunk` streamlines of one file (`rows=chunks`, DVQ-VAE's data point). Streamlines of diffusion imaging have no
direction, and files do not agree on one: points keep the order they are stored in, as in DVQ-VAE's data.
"""

import hashlib
import io
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field, field_validator
from torch import Tensor

from pipelines import storage
from pipelines.corpora import Bad, Corpus, CorpusSettings, Filtered, Joined, Row, Slice, Survey
from pipelines.corpora import _streamline_files as files
from pipelines.corpora import _streamline_shapes as curves
from pipelines.corpora import _streamline_tck as tck
from pipelines.corpora import _streamline_trk as trk
from pipelines.corpora import _streamline_trx as trx
from pipelines.corpora._sources import official_folders, prefixes, top_folder
from pipelines.errors import Failed, Refused

FORMATS: dict[str, Any] = {".trk": trk, ".tck": tck, ".trx": trx}
WHOLE = "w"
SIDES = {"train": "t", "valid": "v", "test": "e"}
SPLIT_OF_SIDE = {letter: split for split, letter in SIDES.items()}
LOOK_AT_ONCE = 16
"""Files surveyed at a time: most of it is waiting for a disk or a network."""
POINTS_AT_ONCE = 1 << 15
"""Points that are resampled together."""


class StreamlineSettings(CorpusSettings):
    rows: Literal["single", "chunks"] = Field("single", description="a row is one streamline, or a chunk of them")
    num_points: int = Field(64, ge=2, le=4096, description="points of a streamline, at equal distances along it")
    chunk: int = Field(64, ge=1, le=4096, description="streamlines of a chunk; used only with rows=chunks")
    order: Literal["shuffled", "file"] = Field(
        "shuffled", description="which streamlines of a file share a chunk: any, or neighbours in the file"
    )
    min_length: float = Field(0.0, ge=0, description="mm; shorter streamlines are left out")
    max_length: float | None = Field(None, gt=0, description="mm; longer streamlines are left out")
    pattern: str | None = Field(
        None,
        description="regular expression found in a file's name, with groups (?P<subject>...) and (?P<bundle>...); "
        "what it has no group for is the parent folder (subject) and the file's stem (bundle)",
    )
    split_by: Literal["auto", "subject", "file", "streamline", "row"] = Field(
        "auto",
        description="what stays in one split; auto: the subject where there are several, else the streamline, and a "
        "chunk holds those of one split; row: chunks are made first (DVQ-VAE's own split)",
    )

    @field_validator("pattern")
    @classmethod
    def _names_something(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            groups = re.compile(value).groupindex.keys()
        except re.error as error:
            raise ValueError(f"it is no regular expression: {error}") from None
        if not groups or not groups <= {"subject", "bundle"}:
            raise ValueError("it needs a group (?P<subject>...) or (?P<bundle>...), and may have no other named one")
        return value


def survey(sources: list[str], settings: StreamlineSettings) -> Survey:
    """What streamlines there are. Labels number the sorted bundles, groups the sorted pairs of subject and bundle.

    Headers are read, of .tck and large .trk files also the data, since only that tells where streamlines begin.

    Raises:
        Refused: a source that does not exist or holds no streamline file, nibabel is missing.
    """
    _require_nibabel()
    found: list[files.Source] = []
    ignored: Counter[str] = Counter()
    for source, prefix in zip(sources, prefixes(sources), strict=True):
        here, left = files.sources_in(storage.list_files(source), prefix)
        if not here:
            held = ", ".join(f"{count:,} x {reason}" for reason, count in left.most_common(3)) or "nothing"
            raise Refused(
                f"there is no streamline file in {source!r}; it holds {held}. Allowed are folders of "
                f"{', '.join(files.EXTENSIONS)} files, and .zip files of those."
            )
        found += here
        ignored.update(left)
    told = {source.name: names for source in found if (names := _told_by(source.name, settings.pattern))}
    if not told:
        raise Refused(
            f"pattern={settings.pattern!r} is found in no name, such as {found[0].name!r}; change it or leave it out."
        )
    ignored.update(["name does not fit `pattern`"] * sum(source.name not in told for source in found))
    found = [source for source in found if source.name in told]
    with ThreadPoolExecutor(LOOK_AT_ONCE) as pool:
        multiple = settings.chunk if settings.rows == "chunks" else 1
        cuts = list(pool.map(lambda source: _cuts(source, multiple), found))
    ignored.update(["no streamline in it"] * sum(not cut for cut in cuts))
    _say_unplaced(found, cuts)
    return _surveyed(found, cuts, told, settings, ignored)


def _say_unplaced(found: list[files.Source], cuts: list[list[files.Cut]]) -> None:
    unplaced = [
        (source.name, runs[0].meta["lacks"])
        for source, runs in zip(found, cuts, strict=True)
        if runs and "lacks" in runs[0].meta
    ]
    if unplaced:
        name, lacks = unplaced[0]
        print(
            f"{len(unplaced):,} of {len(found):,} files do not say where they lie, such as {name!r} (its header has no"
            f" {' and no '.join(lacks)}). They are read as nibabel reads them, a missing vox_to_ras as the identity and"
            " a missing voxel_order as LPS, so their points may not lie where those of other files do. Write them again"
            " with their image as reference if that matters.",
            file=sys.stderr,
        )


def _surveyed(
    found: list[files.Source],
    cuts: list[list[files.Cut]],
    told: Mapping[str, tuple[str, str]],
    settings: StreamlineSettings,
    ignored: Counter[str],
) -> Survey:
    subjects = {subject for subject, _ in told.values()}
    bundles = sorted({bundle for _, bundle in told.values()})
    numbers = {bundle: number for number, bundle in enumerate(bundles)}
    groups = {pair: number for number, pair in enumerate(sorted(set(told.values())))}
    splits = official_folders(source.name for source in found)
    slices: list[Slice] = []
    for source, runs in zip(found, cuts, strict=True):
        subject, bundle = told[source.name]
        about = {"subject": subject, "bundle": bundle, "label": numbers[bundle], "group": groups[subject, bundle]}
        about |= {"format": _suffix(source.name), "member": source.member, "split": splits.get(top_folder(source.name))}
        start = 0
        for run in runs:
            meta = {**about, **run.meta}
            slices.append(Slice(source.uri, source.name, start, start + run.units, run.bytes, meta))
            start += run.units
    split_by = settings.split_by
    if split_by == "auto":
        split_by = "subject" if len(subjects) > 1 else "streamline"
        if split_by == "streamline" and not splits:
            print(
                "all streamlines are of one subject: the split is by streamline, so neighbours of one bundle lie on"
                " both sides of it and test scores say nothing about other subjects. --set split_by=file keeps files"
                " whole; --set pattern=... tells subjects apart by name.",
                file=sys.stderr,
            )
    if split_by == "row" and settings.rows == "chunks" and not splits:
        print(
            "split_by=row: whole chunks are split, as in DVQ-VAE's code. The last chunk of a file is filled up with"
            " repeats of streamlines whose own chunk may be in another split; split_by=streamline has none of that.",
            file=sys.stderr,
        )
    return Survey(slices, {"bundles": bundles, "subjects": len(subjects), "split_by": split_by}, dict(ignored))


def prepare(
    found: Survey,
    settings: StreamlineSettings,
    wanted: Callable[[int], bool],
    split_of: Callable[[str, str | None], str],
) -> Survey:
    """Chunks of streamlines that are split one by one: each slice is told where its units go, a letter each."""
    if settings.rows == "single" or found.context["split_by"] != "streamline":
        return found
    slices = []
    for piece in found.slices:
        names = (f"{piece.name}#{unit}" for unit in range(piece.start, piece.stop))
        sides = "".join(SIDES[split_of(name, piece.meta["split"])] for name in names)
        slices.append(replace(piece, meta={**piece.meta, "sides": sides}))
    return replace(found, slices=slices)


def _cuts(source: files.Source, multiple: int) -> list[files.Cut]:
    try:
        if source.refusal:
            raise files.Unreadable(source.refusal)
        with files.opened(source.uri, source.member) as file:
            cuts: list[files.Cut] = FORMATS[_suffix(source.name)].cuts(file, source.bytes, source.slice_bytes, multiple)
            return cuts
    except files.DAMAGE as damage:
        return [files.Cut(1, 0, {"reason": _reason(damage)})]


def _reason(damage: BaseException) -> str:
    """Why a file could not be read, without its path, which quarantine rows name already."""
    if isinstance(damage, files.Unreadable):
        return str(damage)
    if isinstance(damage, Refused | Failed | OSError):
        system = damage if isinstance(damage, OSError) else damage.__context__
        why = getattr(system, "strerror", None) or type(system or damage).__name__
        return f"could not be read: {why}; it must be there and readable, so look at it and ingest again"
    return files.BROKEN_ARCHIVE


def _told_by(name: str, pattern: str | None) -> tuple[str, str] | None:
    """(subject, bundle) by a file's name; None where the pattern is not in it."""
    path = PurePosixPath(name)
    parent, stem = path.parent.name, path.stem
    if files.is_zip(parent):
        parent = PurePosixPath(parent).stem
    if pattern is None:
        return parent, stem
    found = re.search(pattern, name)
    if found is None:
        return None
    groups = found.groupdict()
    return groups.get("subject") or parent, groups.get("bundle") or stem


def read(
    piece: Slice, context: Mapping[str, Any], settings: StreamlineSettings, wanted: Callable[[int], bool]
) -> Iterator[tuple[int, Row | Bad | Filtered | Joined, bytes]]:
    """Every wanted streamline of a slice as a row or part of one, or the reason why it is none, and its digest."""
    if settings.rows == "chunks":
        yield from _chunks(piece, context, settings, wanted)
        return
    about, split = _about(piece, ""), piece.meta["split"]
    for unit, made, digest in _curves(piece, settings, wanted):
        if not isinstance(made, tuple):
            yield unit, made, digest
            continue
        points, length = made
        name = f"{piece.name}#{piece.start + unit}"
        values = {"points": points, "length": length, **about, "name": name}
        yield unit, Row(values, _split_group(piece, context, name), split), digest


Curve = tuple[np.ndarray, float]
"""Points as resampled, and the length in mm before."""


def _curves(
    piece: Slice, settings: StreamlineSettings, wanted: Callable[[int], bool]
) -> Iterator[tuple[int, Curve | Bad | Filtered, bytes]]:
    for block in _blocks(_points(piece, wanted), settings.num_points):
        made = _made({unit: points for unit, points in block if not isinstance(points, str)}, piece.name, settings)
        for unit, points in block:
            if isinstance(points, str):
                yield unit, Bad(piece.name, points), points.encode()
            else:
                yield unit, made[unit], hashlib.sha256(points.tobytes()).digest()


def _blocks(
    found: Iterator[tuple[int, np.ndarray | str]], num_points: int
) -> Iterator[list[tuple[int, np.ndarray | str]]]:
    """Units as they come, so many that NumPy's calls cost little and so few that they stay in a CPU's cache."""
    block: list[tuple[int, np.ndarray | str]] = []
    size = 0
    for unit, points in found:
        block.append((unit, points))
        size += max(len(points), num_points)
        if size > POINTS_AT_ONCE:
            yield block
            block, size = [], 0
    if block:
        yield block


def _made(
    lines: Mapping[int, np.ndarray], name: str, settings: StreamlineSettings
) -> dict[int, Curve | Bad | Filtered]:
    """What becomes of each unit's line."""
    made: dict[int, Curve | Bad | Filtered] = {}
    for unit, why in zip(lines, curves.why_none([*lines.values()]), strict=True):
        if why:
            made[unit] = Bad(name, why)
    good = [unit for unit in lines if unit not in made]
    ways = dict(zip(good, curves.along([lines[unit] for unit in good]), strict=True))
    lengths = {unit: float(way[-1]) for unit, way in ways.items()}
    for unit, length in lengths.items():
        if not length:
            made[unit] = Bad(name, curves.NO_LENGTH)
        elif length < settings.min_length:
            made[unit] = Filtered("min_length")
        elif settings.max_length is not None and length > settings.max_length:
            made[unit] = Filtered("max_length")
    kept = [unit for unit in good if unit not in made]
    points = curves.resampled([lines[unit] for unit in kept], [ways[unit] for unit in kept], settings.num_points)
    return made | {unit: (one, lengths[unit]) for unit, one in zip(kept, points, strict=True)}


def _points(piece: Slice, wanted: Callable[[int], bool]) -> Iterator[tuple[int, np.ndarray | str]]:
    """Every wanted unit: its points in RAS mm, or why there are none. Damage costs what lies behind it, no more."""
    units, reason, reached = piece.stop - piece.start, piece.meta.get("reason"), 0
    if reason is None:
        try:
            with files.opened(piece.uri, piece.meta["member"]) as file:
                for unit, points in FORMATS[piece.meta["format"]].read(file, piece.meta, units, wanted):
                    yield unit, points
                    reached = unit + 1
                return
        except files.DAMAGE as damage:
            reason = _reason(damage)
    for unit in range(reached, units):
        if wanted(unit):
            yield unit, reason


def _chunks(
    piece: Slice, context: Mapping[str, Any], settings: StreamlineSettings, wanted: Callable[[int], bool]
) -> Iterator[tuple[int, Row | Bad | Filtered | Joined, bytes]]:
    """A row stands at every `chunk`-th good unit of a split, and at the last; which ones are in it is another matter.

    Without `sides` all units are of one split.
    """
    units = list(_curves(piece, settings, wanted))
    sides = piece.meta.get("sides") or WHOLE * (piece.stop - piece.start)
    good: dict[str, list[tuple[int, Curve]]] = {side: [] for side in sorted(set(sides))}
    for unit, made, _ in units:
        if isinstance(made, tuple):
            good[sides[unit]].append((unit, made))
    if settings.order == "shuffled":
        good = {side: [found[place] for place in _shuffled(piece, len(found))] for side, found in good.items()}
    done = dict.fromkeys(good, 0)
    for unit, made, digest in units:
        if isinstance(made, Bad | Filtered):
            yield unit, made, digest
            continue
        side = sides[unit]
        done[side] += 1
        if done[side] % settings.chunk and done[side] < len(good[side]):
            yield unit, Joined(), digest
            continue
        number = (done[side] - 1) // settings.chunk
        name = f"{piece.name}#{piece.start}+{side.replace(WHOLE, '')}{number}"
        values = {**_chunk(good[side], number, settings.chunk, piece.start), **_about(piece, name)}
        split = piece.meta["split"] if side == WHOLE else SPLIT_OF_SIDE[side]
        yield unit, Row(values, _split_group(piece, context, name), split), digest


def _chunk(good: list[tuple[int, Curve]], number: int, size: int, start: int) -> dict[str, Any]:
    """Columns of one chunk; where there are too few, it is filled up with streamlines of the first ones."""
    places = np.arange(number * size, (number + 1) * size)
    members = [good[place % len(good)] for place in places]
    return {
        "points": np.stack([points for _, (points, _) in members]),
        "real": (places < len(good)).astype(np.uint8),
        "length": np.array([length for _, (_, length) in members], np.float32),
        "index": np.array([start + unit for unit, _ in members], np.int64),
    }


def _shuffled(piece: Slice, count: int) -> np.ndarray:
    """A permutation that the file's name and the slice's place decide."""
    key = hashlib.blake2b(f"{piece.name}#{piece.start}".encode("utf-8", "backslashreplace"), digest_size=16).digest()
    # Raw bits and a stable sort, as in plan.py: NumPy may change what `permutation` gives.
    return np.argsort(np.random.Philox(key=np.frombuffer(key, "<u8")).random_raw(count), kind="stable")


def _about(piece: Slice, name: str) -> dict[str, Any]:
    return {**{key: piece.meta[key] for key in ("label", "group", "bundle", "subject")}, "name": name}


def _split_group(piece: Slice, context: Mapping[str, Any], name: str) -> str:
    return {"subject": piece.meta["subject"], "file": piece.name}.get(context["split_by"], name)


def schema(settings: StreamlineSettings) -> pa.Schema:
    """`label` numbers the bundles of the manifest's context; `group` numbers the pairs of subject and bundle."""
    one = (settings.num_points, 3)
    if settings.rows == "single":
        tensors = [("points", pa.fixed_shape_tensor(pa.float32(), one)), ("length", pa.float32())]
    else:
        tensors = [
            ("points", pa.fixed_shape_tensor(pa.float32(), (settings.chunk, *one))),
            ("real", pa.fixed_shape_tensor(pa.uint8(), (settings.chunk,))),
            ("length", pa.fixed_shape_tensor(pa.float32(), (settings.chunk,))),
            ("index", pa.fixed_shape_tensor(pa.int64(), (settings.chunk,))),
        ]
    names = [("label", pa.int32()), ("group", pa.int32())]
    return pa.schema([*tensors, *names, *((name, pa.string()) for name in ("bundle", "subject", "name"))])


def shapes(settings: StreamlineSettings) -> dict[str, list[int] | None]:
    if settings.rows == "single":
        return {"points": [settings.num_points, 3]}
    return {"points": [settings.chunk, settings.num_points, 3], "real": [settings.chunk]}


def tensors(stored: dict[str, Any], settings: StreamlineSettings) -> dict[str, Tensor]:
    """`points` [B, (chunk,) n, 3] in mm, `length`, `label`, `group`; of chunks also bool `real` [B, chunk]."""
    names = ("points", "length", "label", "group")
    found = {name: torch.from_numpy(stored[name]) for name in names}
    return found if settings.rows == "single" else {**found, "real": torch.from_numpy(stored["real"]).bool()}


def write_files(columns: dict[str, Tensor], stems: list[str], directory: str, settings: StreamlineSettings) -> None:
    """Points [B, (chunk,) n, 3] in RAS mm as .tck: one file a chunk, or one file for all single streamlines given.

    Raises:
        Failed: a value that is not finite; in a .tck file it would end a streamline.
    """
    if not stems:
        return
    points = columns["points"].detach().cpu().to(torch.float32).numpy()
    if not np.isfinite(points).all():
        raise Failed("decoded streamlines hold values that are not finite, so they cannot be written as .tck.")
    if settings.rows == "single":
        # A file for each of a million streamlines is nothing that people open.
        stem = stems[0] if len(stems) == 1 else f"{stems[0]}-{stems[-1]}"
        storage.write_atomic(storage.join(directory, f"{stem}.tck"), _as_tck(points))
        return
    real = columns["real"].cpu().bool().numpy() if "real" in columns else np.ones(points.shape[:2], np.bool_)
    for stem, chunk, kept in zip(stems, points, real, strict=True):
        storage.write_atomic(storage.join(directory, f"{stem}.tck"), _as_tck(chunk[kept]))


def _as_tck(points: np.ndarray) -> bytes:
    _require_nibabel()
    from nibabel.streamlines import Tractogram
    from nibabel.streamlines.tck import TckFile

    file = io.BytesIO()
    TckFile(Tractogram(list(points), affine_to_rasmm=np.eye(4))).save(file)
    return file.getvalue()


def _require_nibabel() -> None:
    try:
        import nibabel.streamlines  # noqa: F401
    except ImportError:
        raise Refused("streamlines are read with nibabel: pip install 'vqray[streamlines]'") from None


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


corpus = Corpus(
    Settings=StreamlineSettings,
    survey=survey,
    prepare=prepare,
    read=read,
    schema=schema,
    shapes=shapes,
    tensors=tensors,
    write_files=write_files,
)
