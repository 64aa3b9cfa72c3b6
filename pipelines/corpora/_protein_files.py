"""Bytes of a file, plain or .gz, to its models: which format they are in, and what damage is called.

Only backbone atoms are parsed: a chain needs no others, and damage elsewhere costs nothing.
"""

import gzip
import io
import struct
import warnings
import zlib
from collections import Counter

from pipelines.corpora._protein_atoms import Atoms, UnreadableStructure
from pipelines.corpora._protein_cif import cif_models
from pipelines.corpora._protein_pdb import pdb_models

MOST_FILE_BYTES = 512 << 20
"""Of one file, unpacked. The largest entries of the PDB have about half of it."""
GZIP_MAGIC = b"\x1f\x8b"
DAMAGE = (ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError, RecursionError, struct.error)
"""What biotite and msgpack raise on damaged files beside errors of their own, seen over the formats below."""


def models_of(data: bytes, all_models: bool, mended: Counter[str]) -> list[Atoms]:
    """The models of a file, or the first. What it holds decides how it is read, not its name.

    Args:
        mended: counts what had to be mended, in the words of the row's notes.

    Raises:
        UnreadableStructure: with a short reason.
    """
    from biotite.file import DeserializationError, InvalidFileError
    from msgpack.exceptions import UnpackException

    data = _unpacked(data)
    if not data.strip():
        raise UnreadableStructure("the file is empty")
    form = _form(data)
    try:
        with warnings.catch_warnings():
            # Its notes on optional columns and guessed elements say nothing about a backbone.
            warnings.simplefilter("ignore")
            if form == "PDB":
                return list(pdb_models(data, all_models, mended))
            return cif_models(data, form == "BinaryCIF", all_models)
    except UnreadableStructure:
        raise
    except (*DAMAGE, DeserializationError, InvalidFileError, UnpackException):
        raise UnreadableStructure(f"cut off or damaged: its records are not those of a {form} file") from None


def _unpacked(data: bytes) -> bytes:
    if data[:2] != GZIP_MAGIC:
        return data
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            whole = file.read(MOST_FILE_BYTES + 1)
    except (OSError, EOFError, zlib.error):
        raise UnreadableStructure("cut off or damaged: it does not unpack") from None
    if len(whole) > MOST_FILE_BYTES:
        raise UnreadableStructure(f"it unpacks to more than {MOST_FILE_BYTES:,} bytes")
    return whole


def _form(data: bytes) -> str:
    head = data[:64]
    if head[0] >= 0x80 and any(key in head for key in (b"encoder", b"version", b"dataBlocks")):
        return "BinaryCIF"
    for line in data[: 1 << 16].lstrip(b"\xef\xbb\xbf").splitlines():
        if line.strip() and not line.startswith(b"#"):
            return "mmCIF" if line[:5].lower() == b"data_" else "PDB"
    return "PDB"
