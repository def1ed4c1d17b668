"""Storage failures told in one sentence each: what was given, what was expected, what to do.

For local paths by errno, for s3:// by the server's error code or the client's error class.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_CREDENTIAL_CODES = {
    "403",
    "AccessDenied",
    "ExpiredToken",
    "Forbidden",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
}
_CREDENTIAL_CLASSES = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"}
_NETWORK_CLASSES = {"HTTPClientError", "EndpointConnectionError", "ConnectionError", "TimeoutError"}
# An answer that broke off or is no XML; s3fs repeats after the same ones.
_BROKEN_ANSWER_CLASSES = {"ClientPayloadError", "IncompleteRead", "ResponseParserError"}
_AWAY_CODES = {"InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown", "Throttling"}
_FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT}
_DENIED_ERRNOS = {errno.EACCES, errno.EPERM, errno.EROFS}


def is_s3(uri: str) -> bool:
    """True for s3:// addresses; everything else is a local path."""
    return uri.startswith("s3://")


def split(uri: str) -> tuple[str, str]:
    """Bucket and object key of an s3:// address.

    Raises:
        ValueError: If the bucket is missing.
    """
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise ValueError(f"{uri!r} names no bucket: expected s3://bucket/prefix.")
    return bucket, key


def error_code(error: BaseException) -> str:
    """S3 error code such as NoSuchBucket, or an empty text."""
    return str(_response(error).get("Error", {}).get("Code", ""))


def is_transient(error: BaseException) -> bool:
    """True if the S3 server was away or overloaded, so that the same request may work later."""
    status = _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = error_code(error)
    if code or status:
        return status >= 500 or code in _AWAY_CODES or (code.isdigit() and int(code) >= 500)
    classes = {c.__name__ for c in type(error).__mro__}
    return bool(classes & (_NETWORK_CLASSES | _BROKEN_ANSWER_CLASSES))


def _response(error: BaseException) -> dict[str, Any]:
    """What the server answered, as botocore keeps it; s3fs hides it in the cause."""
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            return response
    return {}


@contextmanager
def clear_errors(uri: str) -> Iterator[None]:
    """Turn storage failures inside the block into one clear error each."""
    try:
        yield
    except Exception as error:
        told = explain(error, uri)
        if told is error:
            raise
        raise told from error


def explain(error: Exception, uri: str) -> Exception:
    """The error to show for a failed access to `uri`; unknown errors come back as they are."""
    return _explain_s3(error, uri) if is_s3(uri) else _explain_local(error, uri)


def _explain_s3(error: Exception, uri: str) -> Exception:
    code = error_code(error)
    classes = {c.__name__ for c in type(error).__mro__}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
    if code == "NoSuchBucket":
        return missing_bucket(uri)
    if code in _CREDENTIAL_CODES or classes & _CREDENTIAL_CLASSES:
        return RuntimeError(
            f"{endpoint} refused access to {uri} ({code or type(error).__name__}): expected keys "
            f"that may read and write "
            f"this bucket; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )
    if classes & _NETWORK_CLASSES:
        return RuntimeError(
            f"S3 endpoint {endpoint} did not answer for {uri} ({type(error).__name__}): expected a "
            f"running S3 server; "
            f"start it or correct AWS_ENDPOINT_URL."
        )
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{uri} does not exist: expected an object; check the address.")
    if isinstance(error, OSError):
        return RuntimeError(
            f"S3 access to {uri} failed ({code or type(error).__name__}: {error}): expected "
            f"success; see the server's log."
        )
    return error


def missing_bucket(uri: str) -> FileNotFoundError:
    """The error for an address whose bucket does not exist."""
    bucket, _ = split(uri)
    return FileNotFoundError(
        f"bucket {bucket!r} of {uri} does not exist: expected an existing bucket; create it or "
        f"correct the address."
    )


def _explain_local(error: Exception, path: str) -> Exception:
    if (
        not isinstance(error, OSError) or error.errno is None
    ):  # without errno it was explained already
        return error
    if error.errno in _FULL_ERRNOS:
        return RuntimeError(
            f"no space left for {path}: expected room on that disk; free some or choose another "
            f"workspace, then run again."
        )
    if error.errno in _DENIED_ERRNOS:
        return RuntimeError(
            f"no permission to write or read {path} ({error.strerror}): expected a folder that "
            f"this user may write; "
            f"change its mode or choose another."
        )
    if isinstance(error, NotADirectoryError | FileExistsError):
        return ValueError(
            f"{path} or one of its parents is a file: expected a folder; choose another path."
        )
    if isinstance(error, IsADirectoryError):
        return ValueError(f"{path} is a folder: expected a file; correct the name.")
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{path} does not exist: expected a file; check the path.")
    return RuntimeError(
        f"access to {path} failed ({error}): expected success; check the disk and the mount."
    )
