"""Small inputs that many tests share, all generated, and the optional real data."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported: threads of tests side by side would wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from dupr_cli.recipe import PretrainRecipe, load_recipe
from tests.support.command_line import pretrain
from tests.support.images import SHARED_DATA, noise_image, write_shards
from tests.support.recipes import TINY

# A busy machine is no failure; where nobody looks for new cases, the known ones must pass.
settings.register_profile("dupr", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("dupr")

# A shell starts what it puts in the background with Ctrl-C ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


# The first backward pass of a process starts autograd's engine. After torch.export or torch.compile
# it would start with threads, and no command forked from this process could train.
torch.autograd.backward(torch.zeros(1, requires_grad=True))


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


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """24 images of several sizes at two depths."""
    folder = tmp_path / "images"
    (folder / "deeper" / "still").mkdir(parents=True)
    for number in range(24):
        place = folder if number % 2 else folder / "deeper" / "still"
        noise_image(number, 40 + number, 50).save(place / f"image{number:02d}.jpg", quality=92)
    return folder


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 small images in five shards."""
    return write_shards(tmp_path_factory.mktemp("shards") / "tiny", 90)


@pytest.fixture(scope="session")
def tiny_run(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a few steps on `tiny_shards`, of a small network."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    pretrain(tiny_shards, run)
    return run


@pytest.fixture
def tiny_recipe() -> Callable[..., PretrainRecipe]:
    """The smallest recipe, with further overrides."""

    def load(*overrides: str) -> PretrainRecipe:
        return load_recipe(PretrainRecipe, "dupr-r18-cpu-smoke", [*TINY, *overrides])

    return load
