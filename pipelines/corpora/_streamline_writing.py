"""Streamlines as a file of the kind they came from, with the header of the file they came from."""

import io
import json
import zipfile
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from pipelines.corpora._streamline_files import Unreadable

HEADER = "header.json"


def as_file(lines: Sequence[npt.NDArray[Any]], like: BinaryIO, suffix: str) -> bytes:
    """Lines [n, 3] in RAS mm as .trk, .tck or .trx.

    What the header of `like` says of space (affine, voxel sizes, dimensions, order) is kept, and what a .tck's says
    otherwise too. Scalars and properties of its streamlines are not: they belong to other points.

    Raises:
        Unreadable: a header that cannot be read.
    """
    return _as_trx(lines, like) if suffix == ".trx" else _by_nibabel(lines, like, suffix)


def _by_nibabel(lines: Sequence[npt.NDArray[Any]], like: BinaryIO, suffix: str) -> bytes:
    from nibabel.streamlines import Tractogram
    from nibabel.streamlines.header import Field
    from nibabel.streamlines.tck import TckFile
    from nibabel.streamlines.tractogram_file import DataError, HeaderError
    from nibabel.streamlines.trk import TrkFile

    kind = {".trk": TrkFile, ".tck": TckFile}[suffix]
    try:
        header = dict(kind.load(like, lazy_load=True).header)
    except (HeaderError, DataError, ValueError) as trouble:
        raise Unreadable(f"its header cannot be read: {trouble}") from None
    if suffix == ".tck":
        # It says how many streamlines it has in text of its own.
        header = {key: value for key, value in header.items() if key not in ("count", Field.NB_STREAMLINES)}
    file = io.BytesIO()
    kind(Tractogram([np.asarray(line, np.float32) for line in lines], affine_to_rasmm=np.eye(4)), header).save(file)
    return file.getvalue()


def _as_trx(lines: Sequence[npt.NDArray[Any]], like: BinaryIO) -> bytes:
    try:
        with zipfile.ZipFile(like) as archive:
            header = json.loads(archive.read(HEADER))
            space = {key: header[key] for key in ("DIMENSIONS", "VOXEL_TO_RASMM")}
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError) as trouble:
        raise Unreadable(f"its header cannot be read: {trouble}") from None
    points = np.concatenate([np.asarray(line, "<f4") for line in lines] or [np.zeros((0, 3), "<f4")])
    offsets = np.cumsum([0, *(len(line) for line in lines)]).astype("<u8")
    counts = {"NB_STREAMLINES": len(lines), "NB_VERTICES": len(points)}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(HEADER, json.dumps({**space, **counts}))
        archive.writestr("positions.3.float32", points.tobytes())
        archive.writestr("offsets.uint64", offsets.tobytes())
    return file.getvalue()
