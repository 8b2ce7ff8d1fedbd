"""Images that must not be in the shards, as hashes: each image of the source is compared with them.

    OUT/.prepare/excluded.json    name, sha256 and perceptual hash of each excluded image

The file is written once, so that all processes, tasks and machines exclude the same images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from dupr_cli.artifacts.files import write_json
from dupr_cli.datasets.copies import HashedImages, ImageHashes
from dupr_cli.errors import UsageError
from dupr_cli.parsing import read_json, validated

_FILE = "excluded.json"
_KIND = "excluded"  # the reasons begin with it
_Look = Annotated[int, Field(ge=0, lt=2**64)] | None  # None: it could not be decoded


class ExcludedImages:
    """The hashes of all images that must not be in the shards.

    names: of the images, for people. digest: identifies the images by their bytes.
    """

    def __init__(self, names: Sequence[str], hashes: Sequence[ImageHashes]) -> None:
        self._names, self._hashes = names, hashes
        self._known = HashedImages(hashes)
        self.digest = hashlib.sha256(b"".join(sorted({h.sha256 for h in hashes}))).hexdigest()

    def reason_for(self, image: ImageHashes) -> str | None:
        """Why an image is left out, or None if it is no copy of an excluded one."""
        copy = self._known.find(image)
        if copy is None:
            return None
        name = self._names[copy.number]
        if copy.same_bytes:
            return f"{_KIND} (same bytes): {name}"
        return f"{_KIND} (looks the same): {name}; {copy.bits} of 64 bits differ"

    def write(self, folder: Path) -> None:
        rows = [
            [name, hashes.sha256.hex(), hashes.perceptual]
            for name, hashes in zip(self._names, self._hashes, strict=True)
        ]
        write_json(folder / _FILE, {"images": rows})

    @classmethod
    def read(cls, folder: Path) -> ExcludedImages:
        """Raises UsageError when the file is missing or damaged."""
        try:
            rows = validated(list[tuple[str, str, _Look]], read_json(folder / _FILE)["images"])
            hashes = [ImageHashes(bytes.fromhex(sha256), look) for _, sha256, look in rows]
            return cls([name for name, _, _ in rows], hashes)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UsageError(
                f"{folder / _FILE}: the hashes of the excluded images cannot be read ({error}). "
                f"Begin again with --overwrite."
            ) from error


def count_excluded(reasons: Mapping[str, int]) -> int:
    """Number of images left out by `exclude`. reasons: number of images by kind of reason."""
    return sum(count for reason, count in reasons.items() if reason.startswith(f"{_KIND} ("))
