from collections.abc import Iterator

import pytest

from drorae.data.readers.filesystem import open_file, read_content, walk
from drorae.store import s3

NAMES = ["a.png", "cat/1.png", "cat//2.png", "/3.png", "cat/4?versionId=x.png", "cat/.hidden.png"]


def test_keys_that_clients_read_differently_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def pages(prefix_uri: str, *, by_folder: bool = False) -> Iterator[s3.Page]:
        assert prefix_uri == "s3://bucket/photos/"
        yield s3.Page(objects=[(name, 1, "etag") for name in NAMES], folders=[])

    monkeypatch.setattr(s3, "list_pages", pages)
    names, rejects = walk("s3://bucket/photos")
    assert names == ["a.png", "cat/1.png"]
    assert sorted(key for key, _ in rejects) == ["/3.png", "cat//2.png", "cat/4?versionId=x.png"]
    assert all("rename the object" in reason for _, reason in rejects)


@pytest.mark.parametrize("uri", ["s3://b/a//b.tar", "s3://b//a.tar", "s3://b/a.tar?versionId=1"])
def test_such_an_address_is_no_source(uri: str) -> None:
    for look in (open_file, read_content):
        with pytest.raises(ValueError, match="versionId= or //"):
            look(uri)
