"""Whose an output directory is: the request that began it is its first file, so reruns and others are told apart."""

from collections.abc import Mapping
from typing import Any

from pipelines import storage
from pipelines.errors import Refused
from pipelines.options import differences

NAMES = ("ingest.json", "run.json", "request.json", "search.json")


def claim(out: str, name: str, request: Mapping[str, Any], what: str, option: str = "--out") -> None:
    """Make `out` this request's before work begins, or find that it is.

    Args:
        name: file of the request below `out`, one of NAMES.
        what: what the directory holds, for the message.
        option: by which it is given, for the message.

    Raises:
        Refused: the directory holds other files, or what another request made; every difference is named.
    """
    home = storage.join(out, name)
    if not storage.exists(home):
        if storage.exists(out) and storage.list_files(out):
            raise Refused(f"{out} holds other files; give another {option}, one that is empty or does not exist.")
        storage.write_json_atomic(home, request)
    elif different := differences(storage.read_json(home), request):
        raise Refused(
            f"{out} holds {what} with other settings or data: {'; '.join(different)}."
            f" Give another {option}, or repeat what it was begun with."
        )
