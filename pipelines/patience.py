"""What a disk or an object store does not do, in this project's words; and an object store asked again while it is not
well.
"""

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache as once
from typing import TypeVar

from pipelines.errors import Failed, Refused
from pipelines.retries import pauses

T = TypeVar("T")

SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")

BUSY = ("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "RequestLimitExceeded")
"""Codes of answers with which S3 asks to be asked again later."""


class Unanswered(Failed):
    """The object store gave no answer, or one that it is not well, for all the patience there was. It may pass."""


@once
def _network_errors() -> tuple[type[Exception], ...]:
    from aiohttp import ClientError as Connection
    from botocore.exceptions import BotoCoreError, ClientError

    return BotoCoreError, ClientError, Connection


def _may_pass(error: Exception) -> bool:
    """Whether the same question may be answered later: the network's faults and a store that is not well."""
    from aiohttp import ClientError as Connection
    from botocore import exceptions as boto

    if isinstance(error, boto.ClientError):
        answer = error.response
        code = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return code >= 500 or code == 429 or answer.get("Error", {}).get("Code") in BUSY
    if isinstance(error, OSError):
        # s3fs tells most faults as errors of the operating system, those of the server as EIO and EBUSY.
        return isinstance(error, TimeoutError | ConnectionError) or error.errno in (None, errno.EIO, errno.EBUSY)
    return isinstance(error, Connection | boto.ConnectionError | boto.HTTPClientError | boto.IncompleteReadError)


_answered = False
"""Whether an object store has answered in this process. One that never did is a wrong address, not a passing fault."""


def asked(uri: str, verb: str, question: Callable[[], T]) -> T:
    """What the object store answers; asked again, with growing pauses, while it is not well."""
    global _answered
    patience, began, waits = float(os.environ.get("VQRAY_STORAGE_PATIENCE") or 120), time.monotonic(), pauses()
    while True:
        try:
            with told(uri, verb):
                found = question()
        except Unanswered:
            if not _answered or time.monotonic() - began > patience:
                raise
        except Refused:
            _answered = True
            raise
        else:
            _answered = True
            return found
        time.sleep(next(waits))


@contextmanager
def told(uri: str, verb: str) -> Iterator[None]:
    """Turn what the disk or the network raises into this project's errors, with the URI and without credentials."""
    local = not uri.startswith("s3://")
    try:
        yield
    except FileNotFoundError:
        raise Refused(f"could not {verb} {uri}: it does not exist.") from None
    except PermissionError as error:
        raise Refused(f"could not {verb} {uri}: permission denied ({_plain(error)}).") from None
    except OSError as error:
        kind = Failed if local or not _may_pass(error) else Unanswered
        raise kind(f"could not {verb} {uri}: {_plain(error)}.") from None
    except Exception as error:
        if local or not isinstance(error, _network_errors()):
            raise
        kind = Unanswered if _may_pass(error) else Failed
        raise kind(
            f"could not {verb} {uri}: {_plain(error)}. Check AWS_ENDPOINT_URL and the AWS_* credentials."
        ) from None


def _plain(error: BaseException) -> str:
    text = (
        (error.strerror if isinstance(error, OSError) and error.strerror else None)
        or str(error)
        or type(error).__name__
    )
    for name in SECRETS:
        if secret := os.environ.get(name):
            text = text.replace(secret, f"${name}")
    return text.rstrip(".")
