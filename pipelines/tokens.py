"""The token that guards a cluster: where it is found, and what is encrypted under it.

Ray writes the environment of a job into its own logs and, for a moment, into the command line of every worker it sets
up. So the variables that go with a job travel sealed under the token, which every node of the cluster has anyway.
"""

import base64
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.errors import Failed, Refused

DEFAULT = Path("~/.ray/auth_token")
SEALED = "VQRAY_SEALED"


@dataclass(frozen=True)
class Token:
    value: str = field(repr=False)
    source: str
    """Where it came from, which may be shown; the value may not."""


def find() -> Token | None:
    """The token of this environment, in Ray's own order: RAY_AUTH_TOKEN, the file at RAY_AUTH_TOKEN_PATH, DEFAULT.

    Raises:
        Refused: RAY_AUTH_TOKEN_PATH names no file that can be read, or an empty one; or what was found is no token.
    """
    if value := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return _checked(value, "RAY_AUTH_TOKEN")
    if named := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        try:
            value = Path(named).expanduser().read_text(encoding="utf-8", errors="replace").strip()
        except OSError as error:
            raise Refused(f"RAY_AUTH_TOKEN_PATH={named} cannot be read: {error.strerror}.") from None
        if not value:
            raise Refused(f"RAY_AUTH_TOKEN_PATH={named} is an empty file; it should hold the cluster's token.")
        return _checked(value, f"the file at RAY_AUTH_TOKEN_PATH={named}")
    try:
        value = DEFAULT.expanduser().read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
    return _checked(value, f"the file {DEFAULT}") if value else None


def _checked(value: str, source: str) -> Token:
    """A token goes into a header: one word of printable ASCII."""
    if not (value.isascii() and value.isprintable()) or " " in value:
        raise Refused(f"{source} does not hold a token: it has {len(value)} characters that are not one plain word.")
    return Token(value, source)


def seal(variables: Mapping[str, str], token: Token) -> str:
    """Variables as text that only a holder of the token can read."""
    return _cipher(token).encrypt(json.dumps(dict(variables)).encode()).decode()


def open_environment() -> None:
    """Put what travelled sealed into this process's environment; without it, do nothing.

    Ray calls this in every worker of a job before any task.

    Raises:
        Failed: this node has no token, or another one than the job was submitted with.
    """
    sealed = os.environ.get(SEALED)
    if sealed is None:
        return
    from cryptography.fernet import InvalidToken

    token = find()
    where = token.source if token else "nowhere"
    try:
        if token is None:
            raise InvalidToken
        os.environ.update(json.loads(_cipher(token).decrypt(sealed.encode())))
    except InvalidToken:
        raise Failed(
            "the variables that came with this job cannot be read here: they are sealed under the token that it was"
            f" submitted with, and this node's token ({where}) is another. Start every node with the same token."
        ) from None


def _cipher(token: Token) -> Any:
    # Imported late: every worker of every job imports this module, few need it.
    from cryptography.fernet import Fernet
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    key = HKDF(SHA256(), 32, salt=None, info=b"vqray variables of a job").derive(token.value.encode())
    return Fernet(base64.urlsafe_b64encode(key))
