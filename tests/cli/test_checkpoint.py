"""`dupr checkpoint`: what it finds in a real run, whole and damaged in the ways that files are."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from dupr_cli.artifacts.checkpoint_inspection import compare_values, diff
from dupr_cli.artifacts.run import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    CheckpointState,
    list_checkpoints,
    write_checkpoint,
)
from tests.support.command_line import dupr
from tests.support.processes import forked
from tests.support.recipes import TINY

pytestmark = pytest.mark.slow

BIAS = "query.image_heads.res5.2.bias"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """A run of four steps with the checkpoints of steps 2 and 4."""
    from dupr_cli import pretrain
    from dupr_cli.recipe import PretrainRecipe, load_recipe

    run = tmp_path_factory.mktemp("trained") / "run"
    recipe = load_recipe(PretrainRecipe, "dupr-r18-cpu-smoke", [*TINY, "train.steps=4"])
    pretrain.run(recipe, str(tiny_shards), run, device="cpu")
    return run


def copy_of(trained: Path, run: Path) -> Path:
    """A copy that shares the files' bytes: whoever changes a file replaces it."""
    return Path(shutil.copytree(trained, run, symlinks=True, copy_function=os.link))


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return copy_of(trained, tmp_path / "run")


def replace(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def flip_a_byte(checkpoint: Path) -> None:
    data = bytearray((checkpoint / MODEL_FILE).read_bytes())
    data[-1000] ^= 1
    replace(checkpoint / MODEL_FILE, bytes(data))


def cut_off(checkpoint: Path) -> None:
    replace(checkpoint / OPTIMIZER_FILE, (checkpoint / OPTIMIZER_FILE).read_bytes()[:-7])


def lose_a_file(checkpoint: Path) -> None:
    (checkpoint / MODEL_FILE).unlink()


def lose_the_state(checkpoint: Path) -> None:
    (checkpoint / STATE_FILE).unlink()


def cut_off_the_state(checkpoint: Path) -> None:
    replace(checkpoint / STATE_FILE, (checkpoint / STATE_FILE).read_bytes()[:100])


def list_nothing(checkpoint: Path) -> None:
    state = json.loads((checkpoint / STATE_FILE).read_text())
    replace(checkpoint / STATE_FILE, json.dumps({**state, "files": {}}).encode())


def be_of_another_step(checkpoint: Path) -> None:
    state = json.loads((checkpoint / STATE_FILE).read_text())
    replace(checkpoint / STATE_FILE, json.dumps({**state, "step": 3}).encode())


SEEN_BY_SIZE = (
    (cut_off, "optimizer.safetensors has"),
    (lose_a_file, "model.safetensors is missing"),
    (lose_the_state, "state.json is missing"),
    (cut_off_the_state, "state.json is cut off or damaged"),
    (list_nothing, "state.json does not list model.safetensors"),
    (be_of_another_step, "state.json is of step 3"),
)
DAMAGES = ((flip_a_byte, "its sha256 is not the recorded one"), *SEEN_BY_SIZE)


def test_list_says_step_size_time_and_latest(run: Path) -> None:
    text = dupr("checkpoint", "list", run).stdout
    assert [line.split()[0] for line in text.splitlines()[:3]] == ["step", "2", "4"]
    assert text.count("whole") == 2
    listed = json.loads(dupr("checkpoint", "list", run, "--json").stdout)
    assert [facts["step"] for facts in listed["checkpoints"]] == [2, 4]
    assert [facts["latest"] for facts in listed["checkpoints"]] == [False, True]
    assert listed["latest"] == "step-00000004"
    assert listed["checkpoints"][0]["bytes"] == sum(
        file.stat().st_size for file in list_checkpoints(run)[0].iterdir()
    )


@pytest.mark.parametrize(("damage", "message"), SEEN_BY_SIZE)
def test_list_says_what_is_wrong(run: Path, damage: object, message: str) -> None:
    assert callable(damage)
    damage(list_checkpoints(run)[0])
    listed = json.loads(dupr("checkpoint", "list", run, "--json").stdout)
    first, second = (facts["problems"] for facts in listed["checkpoints"])
    assert message in first[0]
    assert second == []


def test_list_says_that_the_link_leads_nowhere(run: Path) -> None:
    shutil.rmtree(list_checkpoints(run)[-1])
    assert "`latest` names step-00000004, which does not exist" in (
        dupr("checkpoint", "list", run).stdout.replace("\n", " ")
    )


def test_list_of_a_run_that_has_no_checkpoint_yet(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("stage: pretrain\n")
    assert (
        "no checkpoint; a run writes its first one" in dupr("checkpoint", "list", tmp_path).stdout
    )
    dupr("checkpoint", "verify", tmp_path)


def test_verify_of_a_whole_run_and_of_one_checkpoint(run: Path) -> None:
    lines = dupr("checkpoint", "verify", run).stdout.splitlines()
    assert lines == [f"{path}  ok" for path in list_checkpoints(run)]
    assert dupr("checkpoint", "verify", run / "latest").stdout == f"{run / 'latest'}  ok\n"


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_verify_finds_damage(run: Path, damage: object, message: str) -> None:
    assert callable(damage)
    first, second = list_checkpoints(run)
    damage(first)
    lines = dupr("checkpoint", "verify", run, code=1).stdout.splitlines()
    assert message in lines[0]
    assert lines[1] == f"{second}  ok"
    assert message in dupr("checkpoint", "verify", first, code=1).stdout
    dupr("checkpoint", "verify", second)
    found = json.loads(dupr("checkpoint", "verify", second, first, "--json", code=1).stdout)
    assert not found["whole"]
    listed = [address["checkpoints"][0] for address in found["addresses"]]
    assert [bool(facts["problems"]) for facts in listed] == [False, True]


def test_verify_reports_leftovers_and_leaves_them(run: Path) -> None:
    leftover = run / "checkpoints" / ".step-00000006.4711.tmp"
    leftover.mkdir()
    aside = run / "checkpoints" / "damaged-step-00000002"
    list_checkpoints(run)[0].rename(aside)
    text = dupr("checkpoint", "verify", run).stdout
    for path in (leftover, aside):
        assert f"{path}  left over; may be deleted" in text
        assert path.is_dir()


@pytest.mark.parametrize("verb", ["list", "verify", "diff"])
def test_what_is_no_run_ends_with_code_2(tmp_path: Path, run: Path, verb: str) -> None:
    more = [run] if verb == "diff" else []
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "nowhere", ": the run directory or checkpoint does not exist"),
        (tmp_path / "empty", " is neither a run directory"),
    ):
        done = dupr("checkpoint", verb, path, *more, code=2)
        assert done.stderr.startswith(f"error: {path}{message}")
        assert done.stdout == ""


def test_list_of_a_checkpoint_asks_for_its_run(run: Path) -> None:
    done = dupr("checkpoint", "list", run / "latest", code=2)
    assert "a checkpoint, but a run directory is needed" in done.stderr


def test_diff_of_a_run_with_its_copy_is_identical(trained: Path, run: Path) -> None:
    tensors = sum(len(load_file(trained / "latest" / f)) for f in (MODEL_FILE, OPTIMIZER_FILE))
    text = dupr("checkpoint", "diff", trained, run).stdout
    assert f"identical bit for bit: {tensors} tensors\n" in text
    assert "state.json: the same" in text
    assert "recipe.yaml: the same" in text


def change(checkpoint: Path, name: str, amount: float) -> None:
    """Add to the first value of a tensor; the file keeps its size."""
    tensors = load_file(checkpoint / MODEL_FILE)
    tensors[name].view(-1)[0] += amount
    (checkpoint / MODEL_FILE).unlink()
    save_file(tensors, checkpoint / MODEL_FILE)


def test_diff_names_the_tensor_that_changed(trained: Path, run: Path) -> None:
    change(list_checkpoints(run)[-1], BIAS, 0.5)
    text = dupr("checkpoint", "diff", trained, run, code=1).stdout
    assert f"tensors differ, largest difference 0.5 in {BIAS}\n" in text
    found = json.loads(dupr("checkpoint", "diff", trained, run, "--json", code=1).stdout)
    assert not found["identical"]
    (difference,) = found["differing"]
    assert (difference["file"], difference["name"]) == (MODEL_FILE, BIAS)
    assert difference["differing"] == 1
    assert difference["values"] == 16
    assert difference["largest"] == pytest.approx(0.5, rel=1e-6)


def test_diff_of_two_steps_lists_at_most_20_tensors_largest_first(run: Path) -> None:
    first, second = list_checkpoints(run)
    text = dupr("checkpoint", "diff", first, second, code=1).stdout
    assert " more; --json lists all" in text
    assert sum(line.count("/") == 1 and " query." in line for line in text.splitlines()) <= 20
    found = json.loads(dupr("checkpoint", "diff", first, second, "--json", code=1).stdout)
    sizes = [difference["largest"] for difference in found["differing"]]
    assert sizes == sorted(sizes, reverse=True)
    assert {"key": "step", "a": 2, "b": 4} in found["state"]
    assert found["recipe"] == []


def test_diff_shows_other_recipe_values_and_unknown_state(trained: Path, run: Path) -> None:
    recipe = (run / "recipe.yaml").read_text()
    replace(run / "recipe.yaml", recipe.replace("lr: 0.06", "lr: 0.5").encode())
    state = run / "latest" / STATE_FILE
    replace(state, json.dumps({**json.loads(state.read_text()), "news": {"of": 1}}).encode())
    found = json.loads(dupr("checkpoint", "diff", trained, run, "--json").stdout)
    assert found["recipe"] == [{"key": "optimizer.lr", "a": 0.06, "b": 0.5}]
    assert found["state"] == [{"key": "news.of", "a": "(absent)", "b": 1}]
    dupr("checkpoint", "verify", run)


def test_diff_takes_the_newest_whole_checkpoint_of_a_run(trained: Path, run: Path) -> None:
    first, second = list_checkpoints(run)
    cut_off(second)
    assert diff(run, list_checkpoints(trained)[0]).a == str(first)
    assert "the checkpoint is damaged" in dupr("checkpoint", "diff", run, second, code=2).stderr
    cut_off(first)
    assert "the run has no whole checkpoint" in dupr("checkpoint", "diff", run, run, code=2).stderr


def write(run: Path, model: dict[str, Tensor]) -> Path:
    state = CheckpointState(1, "resnet18", [0.0], [1.0], 32, "", {})
    own_memory = {name: value.clone() for name, value in model.items()}
    return write_checkpoint(run, state, own_memory, {"momentum.w": torch.zeros(3)}, keep=1)


def test_diff_tells_absent_tensors_other_shapes_and_other_types(tmp_path: Path) -> None:
    a, b = torch.zeros(2, 3), torch.ones(2, 3)
    infinite = torch.full((2, 3), torch.inf)
    first = {"same": a, "moved": a, "shape": a, "type": a, "first": a, "inf": a}
    second = {"same": a, "moved": b, "shape": a.T, "type": a.half(), "second": a, "inf": infinite}
    write(tmp_path / "a", first)
    write(tmp_path / "b", second)
    found = diff(tmp_path / "a", tmp_path / "b")
    assert [(d.name, d.a, d.b, d.differing, d.largest) for d in found.differing] == [
        ("first", "F32 [2, 3]", "(absent)", None, None),
        ("second", "(absent)", "F32 [2, 3]", None, None),
        ("shape", "F32 [2, 3]", "F32 [3, 2]", None, None),
        ("type", "F32 [2, 3]", "F16 [2, 3]", None, None),
        ("inf", "F32 [2, 3]", "F32 [2, 3]", 6, None),
        ("moved", "F32 [2, 3]", "F32 [2, 3]", 6, 1.0),
    ]
    assert found.summary == (
        "6 of 8 tensors differ, 1 only in the first, 1 only in the second, "
        "2 of another type or shape, largest difference is not finite in inf"
    )
    assert found.recipe is None
    text = dupr("checkpoint", "diff", tmp_path / "a", tmp_path / "b", code=1).stdout
    assert "only in second" in text
    assert "recipe.yaml: not compared" in text


def test_same_bits_are_the_same_and_other_bits_are_not() -> None:
    nan, other_nan = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    values = torch.stack([nan, torch.tensor(0.0), torch.tensor(-torch.inf)])
    assert compare_values(values, values.clone()) == (0, 0.0)
    assert compare_values(nan, other_nan) == (1, None)
    assert compare_values(nan, torch.tensor(1.0)) == (1, None)
    assert compare_values(torch.tensor([0.0, 2.0]), torch.tensor([-0.0, 2.0])) == (1, 0.0)


@given(st.integers(0, 2**32), st.sampled_from([torch.float32, torch.bfloat16, torch.int64]))
def test_compared_values_are_those_of_numpy(seed: int, dtype: torch.dtype) -> None:
    random = np.random.default_rng(seed)
    a = torch.from_numpy(random.normal(size=(3, 100_000)) * 100).to(dtype)  # several chunks
    b = torch.where(torch.from_numpy(random.random(a.shape) < 0.1), a + 1, a)
    differences = np.abs(a.double().numpy() - b.double().numpy())
    assert compare_values(a, b) == (int(np.count_nonzero(differences)), float(differences.max()))


def test_help_names_the_exit_codes_and_imports_no_heavy_library() -> None:
    probe = (
        "import sys; from dupr_cli.__main__ import main\n"
        "sys.argv = ['dupr', 'checkpoint', 'diff', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'numpy', 'matplotlib', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert "0 all tensors are identical, 1 some differ" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_exit_code_of_the_process(run: Path) -> None:
    command = [sys.executable, "-m", "dupr_cli", "checkpoint", "verify", str(run)]
    assert forked(command).returncode == 0
    flip_a_byte(list_checkpoints(run)[0])
    assert forked(command).returncode == 1
