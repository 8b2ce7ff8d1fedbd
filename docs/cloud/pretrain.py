# /// script
# requires-python = ">=3.11"
# dependencies = ["dupr-cli"]
# ///
"""Images to weights in one call on a rented GPU: `uv run pretrain.py photos/ out/`.

Shards, run and backbone.safetensors go into out/; the same command continues after an interruption.
uv reads the dependencies from the first lines and installs them into the script's own environment.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dupr_cli import export, prepare, pretrain
from dupr_cli.artifacts.shards import MANIFEST


def main(images: str, out: str, recipe: str = "dupr-r50-single-gpu") -> None:
    folder = Path(out)
    if not (folder / "shards" / MANIFEST).exists():
        prepare.run("default", images, folder / "shards")
    pretrain.run(recipe, folder / "shards", folder / "run")
    to = {"formats": ["torchvision"]}
    weights = folder / "backbone.safetensors"
    export.run("default", folder / "run", weights, overrides=to, overwrite=True)


if __name__ == "__main__":
    if not 3 <= len(sys.argv) <= 4:
        sys.exit("usage: uv run pretrain.py IMAGES OUT [RECIPE]")
    main(*sys.argv[1:])
