"""Output folders: one writer, claims that compare, and removal of dupr's own files only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dupr_cli.artifacts.versions import VersionError
from dupr_cli.errors import UsageError
from dupr_cli.runtime.output import (
    LOCK,
    Claim,
    differences,
    holds,
    holds_anything,
    read_claim,
    remove,
    writing,
)
from tests.support.trees import tree_bytes

HOLDER = """
import sys, time
from pathlib import Path
from dupr_cli.runtime.output import writing
with writing(Path(sys.argv[1]), "dupr something", shared=sys.argv[2] == "shared"):
    print("in", flush=True)
    sys.stdin.readline()
"""


def hold(out: Path, kind: str = "alone") -> subprocess.Popen[str]:
    """Another process that writes to `out` until a line is written to it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(out), kind],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    return process


def release(process: subprocess.Popen[str]) -> None:
    process.communicate("\n", timeout=20)


def test_a_second_process_is_refused_and_told_which_one_writes(tmp_path: Path) -> None:
    process = hold(tmp_path / "out")
    with (
        pytest.raises(UsageError, match=rf"process {process.pid} on .* \(`dupr something`\)"),
        writing(tmp_path / "out", "dupr pretrain"),
    ):
        pass
    release(process)
    with writing(tmp_path / "out", "dupr pretrain"):
        pass


def test_the_lock_ends_with_a_killed_process(tmp_path: Path) -> None:
    process = hold(tmp_path / "out")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "out" / LOCK).exists()
    with writing(tmp_path / "out", "dupr pretrain"):
        pass
    assert not (tmp_path / "out" / LOCK).exists()


def test_workers_that_are_forked_do_not_keep_the_lock(tmp_path: Path) -> None:
    """Loader workers outlive a killed main process for seconds."""
    code = HOLDER.replace("print(", "__import__('os').fork() or time.sleep(60)\n    print(")
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out"), "alone"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    process.kill()
    process.wait()
    try:
        with writing(tmp_path / "out", "dupr pretrain"):
            pass
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_tasks_share_an_output_and_keep_others_out(tmp_path: Path) -> None:
    first, second = hold(tmp_path / "out", "shared"), hold(tmp_path / "out", "shared")
    with pytest.raises(UsageError, match="is writing to it"), writing(tmp_path / "out", "merge"):
        pass
    release(first)
    release(second)
    with writing(tmp_path / "out", "merge"):
        pass


def test_one_process_does_not_write_twice_at_once(tmp_path: Path) -> None:
    with (
        writing(tmp_path / "out", "a"),
        pytest.raises(UsageError, match="this process is already writing to it"),
        writing(tmp_path / "out", "b"),
    ):
        pass


def test_many_processes_in_turn_never_overlap(tmp_path: Path) -> None:
    """Each adds one to a number in a file; a lost update would show."""
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from dupr_cli.errors import UsageError\n"
        "from dupr_cli.runtime.output import writing\n"
        "out = Path(sys.argv[1]); done = 0\n"
        "while done < 20:\n"
        "    try:\n"
        "        with writing(out, 'count'):\n"
        "            file = out / 'number'\n"
        "            n = int(file.read_text()) if file.exists() else 0\n"
        "            time.sleep(0.001); file.write_text(str(n + 1)); done += 1\n"
        "    except UsageError:\n"
        "        time.sleep(0.0005)\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")]) for _ in range(3)
    ]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert (tmp_path / "out" / "number").read_text() == "60"


def test_an_output_that_stays_empty_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError), writing(tmp_path / "out", "a"):
        raise UsageError("nothing to write")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with writing(tmp_path / "mine", "a"):
        pass
    assert (tmp_path / "mine").is_dir()


def test_looking_at_an_output_changes_nothing(tmp_path: Path) -> None:
    claim = Claim("claim.json", "evaluation", {"device": "cpu"}, ["01-a"])
    claim.take(make(tmp_path / "ours"), False, lambda _: [])
    (make(tmp_path / "foreign") / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = tree_bytes(tmp_path)
    assert claim.check(tmp_path / "ours") == ["01-a"]
    assert claim.check(tmp_path / "absent") is None
    with pytest.raises(UsageError, match="not empty and holds no evaluation"):
        claim.check(tmp_path / "foreign")
    with pytest.raises(UsageError, match="is a file, but the output must be a folder"):
        holds(tmp_path / "file", ["claim.json"], "evaluation")
    other = Claim("claim.json", "evaluation", {"device": "cuda"}, [])
    with pytest.raises(UsageError, match="device: cpu there, cuda now"):
        other.check(tmp_path / "ours")
    assert tree_bytes(tmp_path) == before


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_claim_lists_the_folders_of_all_calls(tmp_path: Path) -> None:
    def nothing(_: Path) -> list[Path]:
        return []

    Claim("claim.json", "evaluation", {}, ["01-a"]).take(tmp_path, False, nothing)
    Claim("claim.json", "evaluation", {}, ["01-a", "02-b"]).take(tmp_path, False, nothing)
    assert read_claim(tmp_path / "claim.json") == ({}, ["01-a", "02-b"])


def test_a_claim_of_an_older_dupr_is_its_fingerprint_and_may_lack_new_keys(tmp_path: Path) -> None:
    (tmp_path / "claim.json").write_text('{"lr": 0.1, "device": "cpu"}')
    now = {"lr": 0.1, "device": "cpu", "new.key": 3}
    assert Claim("claim.json", "x", now, [], {"new.key": 3}).check(tmp_path) == []
    with pytest.raises(UsageError, match=r"new\.key: 3 there, 4 now"):
        Claim("claim.json", "x", {**now, "new.key": 4}, [], {"new.key": 3}).check(tmp_path)


def test_a_claim_of_a_newer_dupr_is_refused_by_its_format_version(tmp_path: Path) -> None:
    (tmp_path / "claim.json").write_text('{"format_version": 99, "fingerprint": {}, "folders": []}')
    with pytest.raises(VersionError, match="format_version is 99"):
        Claim("claim.json", "x", {}, []).check(tmp_path)


def test_removing_keeps_what_others_put_beside(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "a" / "b" / "ours", tmp_path / "a" / "theirs"
    ours.parent.mkdir(parents=True)
    ours.touch()
    theirs.touch()
    (tmp_path / "empty").mkdir()
    remove(tmp_path, [ours, tmp_path / "a" / "never-there"])
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "empty", "theirs"]


def test_a_digest_is_shortened_in_a_message() -> None:
    found = differences({"data": "a" * 64}, {"data": "b" * 64})
    assert found == {"data": "data: aaaaaaaaaaaa... there, bbbbbbbbbbbb... now"}


def test_temporary_files_of_dupr_do_not_make_a_folder_foreign(tmp_path: Path) -> None:
    (tmp_path / f".model.{os.getpid()}.tmp").touch()
    assert not holds_anything(tmp_path)
    (tmp_path / ".mine.tmp").touch()
    assert holds_anything(tmp_path)


def test_waiting_for_the_end_of_the_other_is_enough(tmp_path: Path) -> None:
    process = hold(tmp_path / "out")
    release(process)
    deadline = time.monotonic() + 10
    while (tmp_path / "out").exists():  # it wrote nothing
        assert time.monotonic() < deadline
        time.sleep(0.01)
