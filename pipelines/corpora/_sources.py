"""What every kind does with the files under its sources: names that stay apart, and why a file is no unit."""

from collections.abc import Iterable
from pathlib import PurePosixPath

from pipelines.corpora import NOT_TEST

SPLIT_FOLDERS = {
    **{"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test"},
    **{"trainset": "train", "validset": "valid", "testset": "test"},
}


def prefixes(sources: list[str]) -> list[str]:
    """Of several sources, each name begins with its source's last word, numbered where two are the same."""
    if len(sources) == 1:
        return [""]
    words = [PurePosixPath(source).name for source in sources]
    return [f"{word}/" if words.count(word) == 1 else f"{n}-{word}/" for n, word in enumerate(words)]


def top_folder(name: str) -> str:
    """In lower case; empty where the name has no folder."""
    head, slash, _ = name.partition("/")
    return head.lower() if slash else ""


def official_folders(names: Iterable[str]) -> dict[str, str]:
    """Top folder -> its split, where train/, valid/ and test/ (or trainset/ ...) are all there is on top.

    Without a valid one, train is cut by the hash. Train alone is no split: then there are none.
    """
    tops = {top_folder(name) for name in names}
    if not tops <= SPLIT_FOLDERS.keys() or {SPLIT_FOLDERS[top] for top in tops} == {"train"}:
        return {}
    spare = "train" if "valid" in {SPLIT_FOLDERS[top] for top in tops} else NOT_TEST
    return {top: spare if SPLIT_FOLDERS[top] == "train" else SPLIT_FOLDERS[top] for top in tops}


def is_hidden(name: str) -> bool:
    """Names that belong to a file system and hold no data, such as the `._photo.jpg` that macOS puts into archives."""
    # Cheap first: a corpus of millions of files asks of every name.
    if not name.startswith(".") and "/." not in name and "__MACOSX" not in name:
        return False
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def why_ignored(name: str, what: str) -> str:
    """Why a file is not `what` ("an image file"), in words that are few over a whole corpus."""
    if is_hidden(name):
        return "hidden file"
    suffix = PurePosixPath(name).suffix.lower()
    known = len(suffix) <= 6 and suffix[1:].isalnum() and not suffix[1:].isdigit()
    return f"not {what} ({suffix if known else 'no suffix'})"
