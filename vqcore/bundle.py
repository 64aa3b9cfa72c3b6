"""A bundle: trained weights and the card that says what they are. One directory, two files, card.json written last.

    model.safetensors   every tensor
    card.json           what the caller says (recipe, settings, K, D, seed, metrics, parents' digests, versions ...)
                        + format, version, files {name: {sha256, bytes}}, digest

A directory without its card does not exist, a card that does not match its files is refused, and so is any file that
the card does not list. Reading parses JSON and safetensors and nothing else: no load path unpickles or runs code.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

FORMAT = "vqray-bundle"
VERSION = 1
WEIGHTS = "model.safetensors"
CARD = "card.json"
PARTIAL = ".partial"
RESERVED = ("format", "version", "files", "digest")
MAX_CARD_BYTES = 64 * 2**20

# Two or more plain path components: `/home/me` is a place on one machine, a SMILES such as `/C=C/` is not.
_LOCAL_PATH = re.compile(r"(file:/.*|(/[\w.+@~-]+){2,}/?|[A-Za-z]:[\\/].*)")


class BundleError(ValueError):
    """A directory is not a whole, unchanged bundle of a known version, or cannot become one."""


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files were checked against its card."""

    card: dict[str, Any]
    """The whole card, with `format`, `version`, `files` and `digest`."""
    tensors: dict[str, Tensor]
    """Name -> tensor on the CPU, dtype and shape as they were written."""
    digest: str
    """sha256 of the card's content; through `files` it covers the weights too."""


def card_digest(card: Mapping[str, Any]) -> str:
    """sha256 (hex) of the canonical JSON of `card` without its `digest`: keys sorted, no blanks, UTF-8."""
    body = {key: value for key, value in card.items() if key != "digest"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_bundle(directory: Path, tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> str:
    """Write weights, then the card, each through a temporary file that is fsynced and renamed.

    Args:
        directory: created if missing. It may hold what an interrupted write left, nothing else.
        tensors: name -> tensor on any device; tensors that share memory are stored once each.
        card: JSON values, the same wherever the run took place: no times, host names or absolute paths, because the
            digest covers all of it.

    Returns:
        The digest. The same tensors and card give the same digest and the same bytes on every machine.

    Raises:
        BundleError: the card holds a reserved key, a value JSON cannot hold or an absolute path; or the directory
            already holds another bundle or a foreign file.
    """
    plain = _plain_card(card)
    directory.mkdir(parents=True, exist_ok=True)
    ours = {WEIGHTS, CARD, WEIGHTS + PARTIAL, CARD + PARTIAL}
    if foreign := sorted(set(_files_under(directory)) - ours):
        raise BundleError(
            f"{directory} holds {foreign[0]!r}, which is no part of a bundle, so the bundle could never be read back. "
            "Write into an empty directory."
        )
    if (directory / CARD).exists():
        return _confirm_same(directory, tensors, plain)
    weights = {name: _owned(tensor) for name, tensor in tensors.items()}
    _replace_atomically(directory / WEIGHTS, lambda path: safetensors.torch.save_file(weights, path))
    plain |= {"format": FORMAT, "version": VERSION, "files": {WEIGHTS: _fingerprint(directory / WEIGHTS)}}
    digest = card_digest(plain)
    text = json.dumps(plain | {"digest": digest}, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    _replace_atomically(directory / CARD, lambda path: path.write_text(text, encoding="utf-8"))
    return digest


def read_card(directory: Path) -> dict[str, Any]:
    """The card alone, with its own digest verified; the files it lists are not opened.

    Raises:
        BundleError: no card, not a card, an unknown version, or edited after it was written.
    """
    path = directory / CARD
    if not path.is_file():
        there = sorted(os.listdir(directory))[:5] if directory.is_dir() else ["no such directory"]
        raise BundleError(
            f"{directory} is not a finished bundle: there is no {CARD} in it ({', '.join(there) or 'it is empty'}). "
            "The card is written last, so a bundle without one was interrupted: run the command that makes it again."
        )
    if path.stat().st_size > MAX_CARD_BYTES:
        raise BundleError(f"{path} has {path.stat().st_size} bytes; a card has at most {MAX_CARD_BYTES}.")
    try:
        card = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{path} is not JSON ({error}). Fetch or make the bundle again.") from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        given = card.get("format") if isinstance(card, dict) else type(card).__name__
        raise BundleError(f"{path} is not the card of a bundle: its format is {given!r}, not {FORMAT!r}.")
    if card.get("version") != VERSION:
        raise BundleError(
            f"{path} has format version {card.get('version')!r}; this vqray reads version {VERSION}. "
            "Read it with the vqray that wrote it, or train again."
        )
    actual = card_digest(card)
    if card.get("digest") != actual:
        raise BundleError(
            f"{path} was changed after it was written: it says digest {card.get('digest')!r}, "
            f"its content has {actual!r}. Fetch or make the bundle again."
        )
    return card


def read_bundle(directory: Path) -> Bundle:
    """Card and weights, after every file was compared with the card.

    Raises:
        BundleError: as `read_card`; or a listed file is missing or has another sha256; or the directory holds a file
            the card does not list (a pickle put beside the weights is refused, not skipped).
    """
    card = read_card(directory)
    listed = card.get("files")
    if not isinstance(listed, dict) or set(listed) != {WEIGHTS} or not isinstance(listed[WEIGHTS], dict):
        raise BundleError(
            f"{directory / CARD} lists {listed!r}; a version {VERSION} bundle has the one file {WEIGHTS!r}."
        )
    if strange := sorted(set(_files_under(directory)) - {WEIGHTS, CARD}):
        raise BundleError(
            f"{directory} holds {', '.join(map(repr, strange[:5]))}, which its card does not list. "
            "A bundle is read whole or not at all: find out where the file comes from, and remove it."
        )
    path = directory / WEIGHTS
    if not path.is_file():
        raise BundleError(f"{path} is missing, though the card lists it. Fetch or make the bundle again.")
    data = path.read_bytes()
    found = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    if found != listed[WEIGHTS]:
        raise BundleError(
            f"{path} does not match its card: {found['bytes']} bytes with sha256 {found['sha256']}, where the card "
            f"says {listed[WEIGHTS].get('bytes')} bytes with {listed[WEIGHTS].get('sha256')}. "
            "Fetch or make the bundle again."
        )
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        raise BundleError(f"{path} is not a safetensors file ({error}), though it matches its card.") from error
    return Bundle(card=card, tensors=tensors, digest=card["digest"])


def _plain_card(card: Mapping[str, Any]) -> dict[str, Any]:
    """`card` as JSON gives it back (tuples as lists), or BundleError."""
    if taken := sorted(set(card) & set(RESERVED)):
        raise BundleError(
            f"the card may not set {', '.join(map(repr, taken))}: write_bundle fills in {', '.join(RESERVED)}."
        )
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(card), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise BundleError(
            f"the card holds a value that JSON cannot hold: {error}. "
            "Use str, int, finite float, bool, None, list and dict."
        ) from error
    for where, text in _strings(plain, "card"):
        if _LOCAL_PATH.fullmatch(text):
            raise BundleError(
                f"{where} is the absolute path {text!r}, which would make the digest depend on this machine. "
                "Use a name relative to the source, or a digest."
            )
    return plain


def _strings(value: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(item, f"{where}[{key!r}]")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _strings(item, f"{where}[{index}]")


def _confirm_same(directory: Path, tensors: Mapping[str, Tensor], plain: dict[str, Any]) -> str:
    """The digest of the bundle that is already there, if it is the one asked for: a rerun is a no-op."""
    there = read_bundle(directory)
    data = safetensors.torch.save({name: _owned(tensor) for name, tensor in tensors.items()})
    files = {WEIGHTS: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}}
    if card_digest(plain | {"format": FORMAT, "version": VERSION, "files": files}) != there.digest:
        raise BundleError(
            f"{directory} already holds the finished bundle {there.digest[:12]}, which is another one. "
            "Bundles do not change: write into another directory."
        )
    return there.digest


def _owned(tensor: Tensor) -> Tensor:
    # safetensors refuses tensors that share memory or are strided; tied weights are worth storing twice.
    return tensor.detach().cpu().contiguous().clone()


def _fingerprint(path: Path) -> dict[str, str | int]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _files_under(directory: Path) -> list[str]:
    """Names relative to `directory` of everything below it, links, hidden files and empty folders included."""
    return [str(path.relative_to(directory)) for path in directory.rglob("*")]


def _refuse_constant(name: str) -> None:
    raise BundleError(f"a card cannot hold {name}: it is no JSON number.")


def _replace_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path` under one fixed name, so a killed write is overwritten by the next; fsync; rename."""
    partial = path.with_name(path.name + PARTIAL)
    write(partial)
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
