import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drorae.data import fingerprint as fingerprints
from drorae.data.fingerprint import Fingerprint, fingerprint, unseen


@pytest.fixture(params=["content", "listing"])
def source(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of 6 files, known by content, or by names, sizes and times as large ones are."""
    if request.param == "listing":
        monkeypatch.setattr(fingerprints, "SMALL_FILES", 0)
    for number in range(6):
        path = tmp_path / "photos" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content {number}")
        os.utime(path, ns=(1, 1_000_000 * number))
    return tmp_path / "photos"


def add(folder: Path) -> None:
    (folder / "new.png").write_text("new")


def remove(folder: Path) -> None:
    (folder / "class0" / "0.png").unlink()


def rename(folder: Path) -> None:
    (folder / "class0" / "0.png").rename(folder / "class1" / "0.png")


def rewrite(folder: Path) -> None:
    (folder / "class0" / "0.png").write_text("changed 0")


def resize(folder: Path) -> None:
    (folder / "class0" / "0.png").write_text("longer than before")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (add, "1 file added, 0 removed, 0 changed"),
        (remove, "0 files added, 1 removed, 0 changed"),
        (rename, "1 file added, 1 removed, 0 changed"),
        (rewrite, "0 files added, 0 removed, 1 changed"),
        (resize, "0 files added, 0 removed, 1 changed"),
    ],
)
def test_every_change_gives_another_digest_and_is_counted(
    source: Path, change: Callable[[Path], None], told: str
) -> None:
    before = fingerprint(str(source))
    assert fingerprint(str(source)).digest == before.digest
    change(source)
    after = fingerprint(str(source))
    assert after.digest != before.digest
    kept = Fingerprint.decode(before.digest, before.encode())
    assert str(after.since(kept)) == told


def test_where_a_source_lies_changes_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fingerprint(str(source)).digest
    (tmp_path / "link").symlink_to(source)
    monkeypatch.chdir(source.parent)
    monkeypatch.setenv("HOME", str(source.parent))
    same = ["photos", "./photos/", "photos/../photos", "~/photos", str(tmp_path / "link")]
    assert {fingerprint(path).digest for path in same} == {expected}
    source.rename(tmp_path / "moved")
    assert fingerprint(str(tmp_path / "moved")).digest == expected


def test_a_linked_file_counts_by_what_it_leads_to(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere.png"
    target.write_text("first")
    (source / "linked.png").symlink_to(target)
    before = fingerprint(str(source))
    target.write_text("second!")
    assert str(fingerprint(str(source)).since(before)) == "0 files added, 0 removed, 1 changed"


def test_hidden_files_loops_and_dead_links_are_harmless(source: Path) -> None:
    before = fingerprint(str(source))
    (source / ".DS_Store").write_text("x")
    (source / "class0" / "loop").symlink_to(source)
    assert fingerprint(str(source)).digest == before.digest
    (source / "dead.png").symlink_to(source / "nothing")
    os.mkfifo(source / "pipe")
    (source / "itself").symlink_to(source / "itself")
    assert fingerprint(str(source)).since(before).added == 3


def test_a_single_file_is_known_by_its_name_and_content(tmp_path: Path) -> None:
    path = tmp_path / "photos.tar"
    path.write_bytes(b"1")
    digest = fingerprint(str(path)).digest
    path.write_bytes(b"2")
    assert fingerprint(str(path)).digest != digest
    assert len(fingerprint(str(path)).rows) == 1


def test_touching_a_small_source_changes_nothing(tmp_path: Path) -> None:
    add(tmp_path)
    before = fingerprint(str(tmp_path)).digest
    os.utime(tmp_path / "new.png", (5, 5))
    assert fingerprint(str(tmp_path)).digest == before


def test_weights_are_known_by_content_whatever_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprints, "SMALL_BYTES", 0)
    monkeypatch.setattr(fingerprints, "SMALL_FILES", 0)
    add(tmp_path)
    before = fingerprint(str(tmp_path), reads_all=True).digest
    os.utime(tmp_path / "new.png", (5, 5))
    assert fingerprint(str(tmp_path), reads_all=True).digest == before
    (tmp_path / "new.png").write_text("wen")
    assert fingerprint(str(tmp_path), reads_all=True).digest != before


def test_a_source_that_grew_large_still_tells_what_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(tmp_path)
    before = fingerprint(str(tmp_path))
    (tmp_path / "other.png").write_text("more")
    monkeypatch.setattr(fingerprints, "SMALL_FILES", 1)
    after = fingerprint(str(tmp_path))
    assert str(after.since(before)) == "1 file added, 0 removed, 0 changed"


def test_objects_are_listed_with_their_versions() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/photos/a/1.png": b"one", "/photos/b/2.png": b"two"})
    try:
        before = fingerprint("memory://photos")
        assert len(before.rows) == 2
        memory.pipe("/photos/b/2.png", b"other")
        memory.pipe("/photos/b/3.png", b"three")
        after = fingerprint("memory://photos")
        assert str(after.since(before)) == "1 file added, 0 removed, 1 changed"
        assert len(fingerprint("memory://photos/a/1.png").rows) == 1
        with pytest.raises(FileNotFoundError):
            fingerprint("memory://nothing")
    finally:
        memory.rm("/photos", recursive=True)


def test_an_asset_is_known_by_its_pinned_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRORAE_ASSETS", str(tmp_path))
    digest = fingerprint("asset:cifar10").digest
    (tmp_path / "index.json").write_text('{"cifar10": {"origin": "another home"}}')
    assert fingerprint("asset:cifar10").digest != digest
    with pytest.raises(ValueError, match="unknown"):
        fingerprint("asset:nope")


def test_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist: expected a folder or a file"):
        fingerprint(str(tmp_path / "gone"))
    assert unseen("a").digest != unseen("b").digest


def test_looking_at_a_source_needs_no_torch() -> None:
    code = "import sys; from drorae.data import fingerprint; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@settings(max_examples=30, deadline=None)
@given(
    before=st.dictionaries(st.text("abc.", min_size=1, max_size=4), st.integers(0, 2)),
    after=st.dictionaries(st.text("abc.", min_size=1, max_size=4), st.integers(0, 2)),
)
def test_counts_are_those_of_the_two_listings(
    before: dict[str, int], after: dict[str, int]
) -> None:
    def listed(files: dict[str, int]) -> Fingerprint:
        memory = fsspec.filesystem("memory")
        memory.store.clear()
        for name, size_bytes in {"anchor": 0, **files}.items():
            memory.pipe(f"/data/x{name}", b"c" * size_bytes)
            memory.store[f"/data/x{name}"].created = datetime(2026, 1, 1, tzinfo=UTC)
        return fingerprint("memory://data")

    change = listed(after).since(listed(before))
    assert change.added == len(after.keys() - before.keys())
    assert change.removed == len(before.keys() - after.keys())
    both = after.keys() & before.keys()
    assert change.changed == sum(after[name] != before[name] for name in both)
