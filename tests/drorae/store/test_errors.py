import errno
import os

import pytest

from drorae.store.errors import clear_errors, error_code, is_s3, split


class ServerSays(OSError):
    """An error as an S3 client raises it."""

    def __init__(self, code):
        super().__init__("server says no")
        self.response = {"Error": {"Code": code}}


class EndpointConnectionError(Exception):
    """Named like the error of botocore."""


@pytest.mark.parametrize(
    ("code", "kind", "text"),
    [
        (errno.EACCES, RuntimeError, "no permission"),
        (errno.EROFS, RuntimeError, "no permission"),
        (errno.EDQUOT, RuntimeError, "no space left"),
        (errno.ENOTDIR, ValueError, "is a file"),
        (errno.EISDIR, ValueError, "is a folder"),
        (errno.EIO, RuntimeError, "check the disk"),
    ],
)
def test_failures_of_the_system_become_one_clear_error(code, kind, text):
    with pytest.raises(kind, match=text), clear_errors("/some/path"):
        raise OSError(code, os.strerror(code))


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ServerSays("NoSuchBucket"), FileNotFoundError, "bucket 'b' .* create it"),
        (ServerSays("SignatureDoesNotMatch"), RuntimeError, "check AWS_ACCESS_KEY_ID"),
        (ServerSays("InternalError"), RuntimeError, "InternalError.* see the server's log"),
        (EndpointConnectionError(), RuntimeError, "correct AWS_ENDPOINT_URL"),
        (FileNotFoundError("key"), FileNotFoundError, "s3://b/key does not exist"),
    ],
)
def test_failures_of_s3_become_one_clear_error(error, kind, text):
    with pytest.raises(kind, match=text), clear_errors("s3://b/key"):
        raise error


def test_error_told_once_is_not_told_again():
    with (
        pytest.raises(FileNotFoundError, match="s3://b/key"),
        clear_errors("/cache"),
        clear_errors("s3://b/key"),
    ):
        raise FileNotFoundError("key")


def test_error_code_comes_from_the_error_or_its_cause():
    outer = OSError("translated")
    outer.__cause__ = ServerSays("NoSuchKey")
    assert error_code(outer) == "NoSuchKey"
    assert error_code(OSError("plain")) == ""


def test_other_errors_pass_unchanged():
    with pytest.raises(KeyError, match="mine"), clear_errors("/some/path"):
        raise KeyError("mine")
    with pytest.raises(KeyError, match="mine"), clear_errors("s3://bucket/path"):
        raise KeyError("mine")


def test_address_is_split_into_bucket_and_key():
    assert is_s3("s3://bucket/a")
    assert not is_s3("/s3/bucket")
    assert split("s3://bucket/a/b") == ("bucket", "a/b")
    with pytest.raises(ValueError, match="names no bucket"):
        split("s3:///a")
