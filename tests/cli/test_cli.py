"""The command line as people use it: messages, exit codes, signals."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from dupr_cli.__main__ import main
from dupr_cli.artifacts.run import list_checkpoints
from dupr_cli.cli.console import ConsoleReporter, print_error
from dupr_cli.cli.doctor import EXTRAS, Diagnosis, show
from dupr_cli.pretrain import estimate
from dupr_cli.runtime.output import LOCK
from tests.support.command_line import TINY_SET, dupr, pretrain
from tests.support.images import noise_image
from tests.support.labelled_scenes import make_tree
from tests.support.processes import drop_rights_of_root, forked
from tests.support.recipes import SMALL_DETECTOR, SMALL_NETWORK
from tests.support.weights import METADATA, random_weights

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", "NO_COLOR": "1"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "dupr_cli", *map(str, arguments)]


def pretrain_command(shards: Path, run: Path, *more: object) -> list[str]:
    return command(
        "pretrain", "dupr-r18-cpu-smoke", "--data", shards, "--out", run, *TINY_SET, *more
    )


def test_version_and_doctor() -> None:
    assert re.fullmatch(r"dupr \d+\.\d+\.\d+\n", dupr("--version").stdout)
    facts = json.loads(dupr("doctor", "--json").stdout)
    assert facts["versions"]["torch"]
    assert facts["advice"]


def test_what_doctor_shows_fits_80_columns_and_can_be_copied(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # for rich, this is a terminal
    monkeypatch.setenv("COLUMNS", "80")
    extras = {name: f"{purpose}: missing" for name, (_, purpose) in EXTRAS.items()}
    show(Diagnosis({"torch": "2.11.0"}, {"memory": "8 GiB"}, extras, ["Use a GPU. " * 15]))
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= 80
    assert any("pip install 'dupr-cli[timm]'" in line for line in lines)


def test_completion_knows_the_commands() -> None:
    done = subprocess.run(
        command(),
        env={**ENVIRONMENT, "_PYTHON -M DUPR_CLI_COMPLETE": "complete_bash"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "pretrain" in done.stdout


def test_recipe_commands(tmp_path: Path) -> None:
    listed = json.loads(dupr("recipe", "list", "--json").stdout)
    assert {"dupr-r18-cpu-smoke", "voc-tiny"} <= {entry["name"] for entry in listed}
    shown = dupr("recipe", "show", "dupr-r18-cpu-smoke", "--set", "seed=7").stdout
    (tmp_path / "r.yaml").write_text(shown)
    assert "seed: 7" in shown
    dupr("recipe", "validate", tmp_path / "r.yaml")
    schema = json.loads(dupr("recipe", "schema", "pretrain").stdout)
    assert "method" in schema["properties"]
    (tmp_path / "r.yaml").write_text(shown.replace("momentum:", "momentun:"))
    done = dupr("recipe", "validate", tmp_path / "r.yaml", code=2)
    assert re.search(r"r.yaml, line \d+: method.momentun is not a key", done.stderr)
    assert done.stdout == ""


@pytest.mark.slow
def test_the_four_stages_from_photographs_to_ap(tmp_path: Path, image_folder: Path) -> None:
    for number in range(24, 60):
        noise_image(number).save(image_folder / f"more{number}.jpg")
    shards, run, weights = tmp_path / "shards", tmp_path / "run", tmp_path / "w.safetensors"
    prepared = json.loads(dupr("prepare", image_folder, shards, "--json").stdout)
    assert prepared["samples"] == {"train": 60}
    # One of the stages as a process of its own.
    done = forked(pretrain_command(shards, run, "--json"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 6
    assert {p.name for p in run.iterdir()} >= {
        "recipe.yaml", "environment.json", "metrics.jsonl", "checkpoints", "latest",
    }  # fmt: skip
    assert list(run.glob("events.out.tfevents.*"))
    exported = json.loads(
        dupr("export", run, "--to", "torchvision", "--out", weights, "--json").stdout
    )
    assert exported["architecture"] == "resnet18"
    tree = tmp_path / "VOC2026"
    from dupr_cli.demo.scenes import write_voc_tree

    write_voc_tree(tree, {"train": 6, "val": 4}, seed=0)
    evaluation = dupr(
        "evaluate", "voc", weights, "none", "--data", tree, "--out", tmp_path / "ev", "--json",
        "--set", "train.iterations=2", "--set", "train.milestones=[]", "--set", "train.workers=0",
        "--set", "data.train_sizes=[64]", "--set", "data.test_size=64",
        "--set", "train.batch_size=2", "--set", "test.precise_bn_batches=1",
    )  # fmt: skip
    results = json.loads(evaluation.stdout)
    assert [entry["weights"] for entry in results["results"]] == [str(weights), "none"]
    assert {"results.json", "table.txt", "detections.png"} <= {
        p.name for p in (tmp_path / "ev").iterdir()
    }


def test_dry_run_prints_a_recipe_and_does_nothing(tmp_path: Path, tiny_shards: Path) -> None:
    done = pretrain(tiny_shards, tmp_path / "run", "--dry-run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "printed.yaml").write_text(done.stdout)
    dupr("recipe", "validate", tmp_path / "printed.yaml")
    assert "held_out" in done.stdout
    dupr("prepare", tiny_shards, tmp_path / "again", "--dry-run")
    assert not (tmp_path / "again").exists()


def test_wrong_input_is_one_message_with_exit_code_2(tmp_path: Path, tiny_shards: Path) -> None:
    from dupr_cli.artifacts.weights import write_weights
    from dupr_cli.models.resnet import ResNetBackbone

    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.safetensors").write_bytes(b"\0" * 20)
    (tmp_path / "pickle.pth").write_bytes(b"\x80\x04")
    wrong = tmp_path / "wrong.safetensors"
    write_weights(wrong, ResNetBackbone("resnet34").state_dict(), METADATA)  # says resnet18
    out = tmp_path / "out"
    unused = ("none", "--data", out, "--out", out)
    tiny_run = ("pretrain", "dupr-r18-cpu-smoke", "--data", tiny_shards, "--out", out)
    for arguments, message in (
        (("prepare", tmp_path / "nowhere", out), "the file or folder does not exist"),
        (("prepare", tmp_path / "empty", out), "the folder is empty"),
        (("prepare", tiny_shards, out, "--set", "shard.max_sample=3"), "Did you mean shard.max_"),
        (("pretrain", "dupr-r18-cpu-smok", "--data", "x", "--out", out), "Did you mean dupr-r18-"),
        (("pretrain", "voc-tiny", "--data", "x", "--out", out), "is a recipe for dupr evaluate"),
        (("pretrain", "dupr-r18-cpu-smoke", "--out", out), "--data SHARDS is missing"),
        (
            ("pretrain", "dupr-r18-cpu-smoke", "--data", out, "--out", out),
            "the shard does not exist",
        ),
        (
            (*tiny_run, "--device", "x"),
            "use auto, cpu, cuda",
        ),
        (
            (*tiny_run, "--set", f"method.queue_length={10**12}"),
            "GiB of memory, and there are",
        ),
        ((*tiny_run, "--set", "method.views.size=1000000"), "be less than or equal to 1024"),
        (
            ("evaluate", "voc", *unused, "--set", "data.train_sizes=[1000000]"),
            "error: --set data.train_sizes=[1000000]: data.train_sizes.0 is 1000000, but it should",
        ),
        (
            ("evaluate", "knn", *unused, "--set", "images.resize=1000000"),
            "images.resize is 1000000, but it should be less than or equal to 8192",
        ),
        (
            ("prepare", tiny_shards, out, "--workers", 10**5),
            "100000 worker processes would need",
        ),
        (("prepare", "verify", tiny_shards, "--workers", 10**5), "Use fewer; more than one"),
        (("export", tmp_path / "empty", "--out", out), "not a run directory with checkpoints"),
        (("export", tmp_path / "cut.safetensors", "--out", out), "not a whole safetensors file"),
        (("export", tmp_path / "pickle.pth", "--out", out), "can run code when they are loaded"),
        (("export", wrong, "--out", out), "the weights do not fit a resnet18"),
        (
            ("export", wrong, "--to", "caffe", "--out", out),
            "caffe is unknown; use d-fine",
        ),
        (("evaluate", "voc", "none", "--data", out, "--out", out), "does not exist"),
        (("recipe", "show", "nothing"), "neither a file nor a shipped recipe"),
    ):
        done = dupr(*arguments, code=2)
        assert message in done.stderr, (arguments, done.stderr)
        assert done.stderr.count("error:") == 1
        assert not out.exists()


def test_an_allocation_that_fails_is_one_message(
    tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch raises a plain RuntimeError for it. The check is told of more memory."""
    monkeypatch.setattr(estimate, "device_memory_bytes", lambda _: 2**62)
    done = dupr("pretrain", "dupr-r18-cpu-smoke", "--data", tiny_shards, "--out", tmp_path / "out",
                "--set", f"method.queue_length={10**12}", code=1)  # fmt: skip
    assert done.stderr.endswith(
        "error: out of memory. Use smaller batches or images, or fewer workers.\n"
    )


def test_a_limit_of_memory_that_torch_does_not_fit_in_is_one_message(
    tmp_path: Path, tiny_shards: Path
) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (1_200_000_000, 1_200_000_000))

    done = subprocess.run(
        pretrain_command(tiny_shards, tmp_path / "out"), preexec_fn=limit,
        capture_output=True, text=True, env=ENVIRONMENT, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: out of memory. Use smaller batches or images")
    assert "Traceback" not in done.stderr


def test_traceback_only_on_request(tmp_path: Path) -> None:
    done = subprocess.run(
        command("prepare", tmp_path / "x", tmp_path / "y", "--traceback"),
        capture_output=True, text=True, env=ENVIRONMENT, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_output_that_cannot_be_written(image_folder: Path, tmp_path: Path) -> None:
    done = dupr("prepare", image_folder, "/proc/dupr-cannot-write-here", code=1)
    assert "/proc/dupr-cannot-write-here: No such file or directory" in done.stderr


@pytest.mark.parametrize("stage", ["prepare", "pretrain", "export", "import", "evaluate"])
def test_a_folder_where_others_alone_may_write_is_one_message(
    tmp_path: Path, tiny_shards: Path, image_folder: Path, stage: str
) -> None:
    theirs, weights = tmp_path / "theirs", tmp_path / "weights.safetensors"
    theirs.mkdir()
    out = theirs / "out"
    small = [word for override in SMALL_DETECTOR for word in ("--set", override)]
    if stage in ("export", "import"):
        random_weights(weights)
    arguments: dict[str, list[object]] = {
        "prepare": ["prepare", image_folder, out, "--workers", 1],
        "pretrain": [*pretrain_command(tiny_shards, out, "--set", SMALL_NETWORK)[3:]],
        "export": ["export", weights, "--to", "timm", "--out", out],
        "import": ["import", weights, "--out", out],
        "evaluate": [
            "evaluate", "voc", "none", "-r", "voc-frozen-tiny", "--data", tmp_path / "tree",
            "--out", out, "--device", "cpu", *small,
        ],
    }  # fmt: skip
    if stage == "evaluate":
        make_tree(tmp_path / "tree")

    def as_another_user() -> None:
        drop_rights_of_root()
        sys.argv = ["dupr", *map(str, arguments[stage])]
        main()

    theirs.chmod(0o555)
    done = forked(as_another_user)
    assert done.returncode == 1, done.stderr
    assert f"error: {out}: Permission denied. Give a path that you may" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(theirs.iterdir()) == []
    theirs.chmod(0o755)


def test_a_finished_set_of_another_user_is_answered_as_for_its_owner(
    image_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "shards"
    words = ["prepare", image_folder, out, "--workers", 1]
    dupr(*words)
    names = {path.name for path in out.iterdir()}

    def as_another_user(*more: object) -> subprocess.CompletedProcess[str]:
        def run() -> None:
            drop_rights_of_root()
            sys.argv = ["dupr", *map(str, [*words, *more])]
            main()

        return forked(run)

    out.chmod(0o555)
    done = as_another_user()
    assert done.returncode == 0, done.stderr
    assert f"{out} is already complete; nothing to do" in done.stderr
    written = as_another_user("--overwrite", "--set", "image.quality=50")
    assert written.returncode == 1
    assert f"error: {out / LOCK}: Permission denied. Give a path" in written.stderr
    assert {path.name for path in out.iterdir()} == names
    out.chmod(0o755)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["prepare", "pretrain"])
def test_output_that_does_not_fit_leaves_nothing_half_written(
    tmp_path: Path, tiny_shards: Path, stage: str
) -> None:
    """A limit on file sizes refuses writes in the middle of a file, as a full disk does."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for number in range(30):
        noise_image(number, 300, 200).save(source / f"{number:04d}.png")
    commands = {
        "prepare": command("prepare", source, out, "--workers", 1),
        "pretrain": pretrain_command(tiny_shards, out, "--set", SMALL_NETWORK),
    }
    arguments = commands[stage]

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        sys.argv = ["dupr", *arguments[3:]]
        main()

    done = forked(limited)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.search(rf"error: {out}/.*(File too large|cannot be written)", done.stderr)
    assert not [p for p in out.rglob("*") if p.name.endswith(".tmp")]
    assert not list(out.glob("*.tar"))
    assert not list_checkpoints(out)
    dupr(*arguments[3:])


def test_names_with_colons_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Rich would draw `:train:` as a train."""
    print_error("shards:train: 12 images")
    ConsoleReporter().warning("shards:train: 12 images")
    assert capsys.readouterr().err.count("shards:train: 12 images") == 2
