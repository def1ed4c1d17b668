"""What a bucket contains, from one paged listing of a real server."""

import os

import pytest

from drorae.data.fingerprint import fingerprint
from drorae.store import files, s3

pytestmark = pytest.mark.slow


def test_objects_are_known_by_name_size_and_etag(s3_uri: str) -> None:
    for name, content in (("a/1.png", b"one"), ("a/2.png", b"two"), (".hidden", b"x")):
        files.write_bytes(f"{s3_uri}/photos/{name}", content)
    before = fingerprint(f"{s3_uri}/photos")
    assert len(before.rows) == 2
    assert fingerprint(f"{s3_uri}/photos/").digest == before.digest
    files.write_bytes(f"{s3_uri}/photos/a/1.png", b"eno")
    files.write_bytes(f"{s3_uri}/photos/a/3.png", b"three")
    files.delete(f"{s3_uri}/photos/a/2.png")
    after = fingerprint(f"{s3_uri}/photos")
    assert str(after.since(before)) == "1 file added, 1 removed, 1 changed"
    assert len(fingerprint(f"{s3_uri}/photos/a/3.png").rows) == 1
    with pytest.raises(FileNotFoundError, match="does not exist"):
        fingerprint(f"{s3_uri}/nothing")


def test_a_moved_prefix_has_the_same_digest(s3_uri: str) -> None:
    for place in ("here", "elsewhere/deep"):
        files.write_bytes(f"{s3_uri}/{place}/a/1.png", b"one")
    digests = {fingerprint(f"{s3_uri}/{place}").digest for place in ("here", "elsewhere/deep")}
    assert len(digests) == 1


def test_more_objects_than_one_page(s3_uri: str) -> None:
    client = s3.filesystem()
    client.pipe({f"{s3_uri}/many/{number}.png": os.urandom(4) for number in range(1100)})
    assert len(fingerprint(f"{s3_uri}/many").rows) == 1100
