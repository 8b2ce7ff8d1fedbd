"""Small inputs that many tests share, all generated, and the optional real data."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported: threads of tests side by side would wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

from dupr_cli.artifacts.shard_files import Sample, write_shard
from dupr_cli.artifacts.shards import Manifest, ShardEntry
from dupr_cli.recipe import PretrainRecipe, load_recipe

# A busy machine is no failure; where nobody looks for new cases, the known ones must pass.
settings.register_profile("dupr", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("dupr")

# A shell starts what it puts in the background with Ctrl-C ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# The method at its smallest: one epoch step takes a fraction of a second.
TINY = (
    "method.views.size=32",
    "method.patch.bins.res4=2",
    "method.patch.bins.res5=1",
    "method.queue_length=64",
    "method.batch_norm.groups=2",
    "method.embedding_dim=16",
    "data.batch_size=8",
    "data.holdout=8",
    "data.workers=0",
    "optimizer.warmup_steps=2",
    "train.steps=6",
    "train.log_every=2",
    "train.probe_every=3",
    "train.checkpoint_every=2",
)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Several test processes share the cores.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images; the test is skipped, saying so, where they are not beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data is not there: {SHARED_DATA}")
    return SHARED_DATA


def noise_image(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """A smooth random picture: blobs rather than pixel noise, so that views resemble each other."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, format_: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """24 images of several sizes at two depths."""
    folder = tmp_path / "images"
    (folder / "deeper" / "still").mkdir(parents=True)
    for number in range(24):
        place = folder if number % 2 else folder / "deeper" / "still"
        noise_image(number, 40 + number, 50).save(place / f"image{number:02d}.jpg", quality=92)
    return folder


def write_shards(folder: Path, samples: int, per_shard: int = 20) -> Path:
    folder.mkdir(parents=True)
    entries = []
    for number, first in enumerate(range(0, samples, per_shard)):
        shard = [
            Sample(f"s{i:04d}", "jpg", encode(noise_image(i)), f"s{i:04d}.jpg", 48, 40)
            for i in range(first, min(samples, first + per_shard))
        ]
        name = f"train-{number:06d}.tar"
        index = write_shard(folder / name, shard)
        entries.append(ShardEntry(name, len(index), index.bytes, index.sha256))
    Manifest({"train": entries}, [], 0, {}, "test", {}, "test", "0").write(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 small images in five shards."""
    return write_shards(tmp_path_factory.mktemp("shards") / "tiny", 90)


@pytest.fixture
def tiny_recipe() -> Callable[..., PretrainRecipe]:
    """The smallest recipe, with further overrides."""

    def load(*overrides: str) -> PretrainRecipe:
        return load_recipe(PretrainRecipe, "dupr-r18-cpu-smoke", [*TINY, *overrides])

    return load
