"""What a folder holds, to show that something did not change it."""

from __future__ import annotations

import hashlib
from pathlib import Path


def tree_bytes(root: Path) -> dict[str, str]:
    """Kind, digest, mode and modification time of everything below `root`, by relative path."""
    found = {}
    for path in sorted(root.rglob("*")):
        name, facts = path.relative_to(root).as_posix(), path.lstat()
        if path.is_symlink():
            found[name] = f"link {path.readlink()}"
        elif path.is_dir():
            found[name] = f"folder {facts.st_mode:o}"
        else:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[name] = f"file {digest} {facts.st_mode:o} {facts.st_mtime_ns}"
    return found


def file_digests(root: Path) -> dict[str, str]:
    """sha256 of every file below `root`, by relative path."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }
