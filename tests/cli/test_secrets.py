"""Passwords, signatures and tokens are used, and are in nothing that a command writes or prints."""

from __future__ import annotations

import base64
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dupr_cli import prepare
from dupr_cli.artifacts.shards import Manifest, open_shards
from dupr_cli.errors import UsageError
from dupr_cli.prepare import source_record
from dupr_cli.prepare.listing import write_listing
from dupr_cli.prepare.sources import Entry, RawImage
from dupr_cli.recipe import PrepareRecipe, load_recipe
from tests.support.command_line import dupr, pretrain
from tests.support.images import encode, noise_image, write_shards
from tests.support.servers import Guarded, guard

PASSWORD, SIGNATURE = "Pass-m4rked", "sig=S1gn-m4rked.x.y"
USER = f"me:{PASSWORD}"
MARKS = ("m4rked", base64.b64encode(USER.encode()).decode())


@pytest.fixture
def guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guarded]:
    monkeypatch.setenv("DUPR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    (tmp_path / "served").mkdir()
    for name in "abcdefg":
        data = encode(noise_image(ord(name)), "PNG")
        (tmp_path / f"served/{name}.png").write_bytes(data)
    with guard(tmp_path / "served", USER, SIGNATURE) as server:
        yield server


def addresses(server: Guarded) -> list[str]:
    return [
        server.url("basic/a.png", USER),
        server.url(f"signed/b.png?{SIGNATURE}"),
        server.url("same/c.png", USER),
        server.url("away/d.png", USER),
        server.url("basic/e.png", "me:wrong-m4rked"),
        server.url("signed/f.png?sig=wrong-m4rked.z"),
        server.url("failing/g.png?m4rked=1", USER),
        server.url("refused/g.png?m4rked=1", USER),
        f"http://me:m4rked/and@127.0.0.1:{server.port}/basic/g.png",
        f"http://me@127.0.0.1:no-port/g.png?{SIGNATURE}",
    ]


def require_no_secrets(*places: Path | str) -> None:
    """Neither in a text, nor in the names and contents of files."""
    for place in places:
        if isinstance(place, str):
            assert not [mark for mark in MARKS if mark in place], place
            continue
        for path in place.rglob("*"):
            require_no_secrets(path.name)
            if path.is_file() and path.suffix == ".gz":
                require_no_secrets(str([*source_record.read_record(path)]))
            elif path.is_file():
                require_no_secrets(path.read_bytes().decode("latin-1"))


def run(*arguments: object) -> str:
    command = [sys.executable, "-m", "dupr_cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_list_of_addresses(guarded: Guarded, tmp_path: Path) -> None:
    listed, out = tmp_path / "list.txt", tmp_path / "out"
    listed.write_text("\n".join(addresses(guarded)) + "\n")
    limits = ["--set", "source.max_seconds=2"]
    for more in (["--dry-run"], ["-v"], ["--json"], ["--dry-run", "--json"]):
        require_no_secrets(run("prepare", listed, out, "--workers", 1, *limits, *more))
    require_no_secrets(out)
    shards = open_shards(str(out))
    names = {shards[n].source.partition("?")[0][-5:] for n in range(len(shards))}
    assert names == {"a.png", "b.png", "c.png", "d.png"}
    lines = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert {line["path"].partition("?")[0][-5:] for line in lines} >= {"e.png", "f.png", "g.png"}
    assert guarded.away == [("/d.png", None)]


def test_a_list_that_grows_and_gets_another_password(guarded: Guarded, tmp_path: Path) -> None:
    listed, out = tmp_path / "list.txt", tmp_path / "out"
    first = [guarded.url("basic/a.png", USER), guarded.url(f"signed/b.png?{SIGNATURE}")]
    listed.write_text("\n".join(first))
    prepare.run("default", listed, out, workers=1)
    listed.write_text("\n".join([guarded.url("basic/a.png", "me:new"), first[1]]))
    before = len(guarded.requests)
    assert prepare.plan("default", listed, out).action == "nothing"
    more = [*first, guarded.url("basic/c.png", USER), guarded.url("basic/c.png", "other:user")]
    listed.write_text("\n".join(more))
    assert len(guarded.requests) == before
    result = prepare.run("default", listed, out, workers=1, append=True)
    assert result.samples == {"train": 3}
    require_no_secrets(out)


def test_a_password_in_netrc_is_sent_to_its_host_alone(
    guarded: Guarded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text(
        f"machine 127.0.0.1 login me password {PASSWORD}\ndefault login a password b\n"
    )
    monkeypatch.setenv("NETRC", str(netrc))
    listed, out = tmp_path / "list.txt", tmp_path / "out"
    paths = ("basic/a.png", "same/b.png", "away/c.png")
    listed.write_text("\n".join(map(guarded.url, paths)))
    assert prepare.run("default", listed, out, workers=1).samples == {"train": 3}
    assert guarded.away == [("/c.png", None)]
    before = len(guarded.requests)
    listed.write_text(guarded.url("basic/a.png").replace("127.0.0.1", "localhost"))
    assert "401" in dupr("prepare", listed, tmp_path / "other", "--workers", 1, code=1).stderr
    assert [given for _, given in guarded.requests[before:]] == [None]


def test_the_listing_of_unfinished_work_is_for_its_owner_alone(
    guarded: Guarded, tmp_path: Path
) -> None:
    listed, out = tmp_path / "list.txt", tmp_path / "out"
    for shuffle in ("false", "true"):
        listed.write_text("\n".join(addresses(guarded)[:3]))
        more = ("--task", "1/2", "--overwrite") if shuffle == "true" else ("--task", "1/2")
        settings = ("--set", "shard.max_samples=1", "--set", f"shard.shuffle={shuffle}")
        require_no_secrets(run("prepare", listed, out / shuffle, "--workers", 1, *settings, *more))
        private = [
            path for path in (out / shuffle).rglob("*")
            if path.is_file() and any(mark.encode() in path.read_bytes() for mark in MARKS)
        ]  # fmt: skip
        assert [path.name for path in private] == ["train.jsonl"]
        assert stat.S_IMODE(private[0].stat().st_mode) == 0o600
        run("prepare", listed, out / shuffle, "--workers", 1, *settings, "--task", "2/2")
        run("prepare", "merge", out / shuffle)
        require_no_secrets(out)


class OtherSource:
    """As of another package: what is to be fetched is the place of an entry and not its name."""

    labelled, remote = False, True

    def __init__(self, places: list[str], folder: Path) -> None:
        self.notes: list[str] = []
        self.places, self.folder = places, folder
        self.modes_while_listing = set[int]()

    def entries(self) -> Iterator[Entry]:
        for number, place in enumerate(self.places):
            yield Entry(f"{number}.png", place)
            self.modes_while_listing |= modes(self.folder)

    def read(self, entry: Entry) -> RawImage:
        raise NotImplementedError


def modes(folder: Path) -> set[int]:
    """Of the files of a listing that hold entries."""
    files = [path for path in (folder / "listing").iterdir() if path.suffix != ".starts"]
    return {stat.S_IMODE(path.stat().st_mode) for path in files}


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_listing_is_private_from_its_first_byte_until_it_is_known_to_hold_no_secret(
    tmp_path: Path, shuffle: bool
) -> None:
    recipe = load_recipe(PrepareRecipe, None, [f"shard.shuffle={str(shuffle).lower()}"])
    places = ["https://host/a.png", f"https://host/b.png?{SIGNATURE}"]
    for count, mode in ((1, 0o644), (2, 0o600)):
        source = OtherSource(places[:count], tmp_path / str(count))
        before = os.umask(0o022)
        write_listing(source, recipe, source.folder)
        os.umask(before)
        assert source.modes_while_listing == {0o600}
        assert modes(source.folder) == {mode}


def test_sets_that_were_made_with_whole_addresses_are_continued(
    guarded: Guarded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed, out = tmp_path / "list.txt", tmp_path / "out"
    paths = [guarded.url(f"signed/{name}.png?{SIGNATURE}") for name in "abcd"]
    listed.write_text("\n".join(paths[:3]))
    with monkeypatch.context() as old:  # as an earlier version, which had no public form
        for module in [*sys.modules.values()]:
            if getattr(module, "__name__", "").startswith("dupr_cli.prepare"):
                for name in ("public_address", "without_secrets"):
                    if hasattr(module, name):
                        old.setattr(module, name, lambda text: text)
        held = ["split.held_out=0.5"]
        prepare.run("default", listed, out, overrides=held, workers=1)
    assert "m4rked" in str([*source_record.read_record(out / "source.jsonl.gz")])
    before = Manifest.read(out)
    assert prepare.plan("default", listed, out, overrides=held).action == "nothing"
    listed.write_text("\n".join(paths))
    result = prepare.run("default", listed, out, overrides=held, workers=1, append=True)
    assert sum(result.samples.values()) == 4
    assert before.samples == 3
    listed.write_text("\n".join(paths[1:]))
    with pytest.raises(UsageError) as error:
        prepare.run("default", paths[0], out, overrides=held, workers=1)
    require_no_secrets(str(error.value))


@pytest.mark.slow
def test_pre_training_on_remote_shards(guarded: Guarded, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "made", 90)
    for path in shards.iterdir():
        path.rename(tmp_path / "served" / path.name)
    run_folder = tmp_path / "run"
    printed = pretrain(guarded.url("basic", USER), run_folder, "--steps", 1, "-v")
    require_no_secrets(printed.stdout, printed.stderr, run_folder, tmp_path / "cache")
    assert "127.0.0.1" in (run_folder / "environment.json").read_text()
    failed = pretrain(guarded.url("basic", "me:m4rked"), tmp_path / "no", "--steps", 1, code=2)
    assert "401" in failed.stderr
    require_no_secrets(failed.stderr)
    out = tmp_path / "exported"
    call = ("export", run_folder, "--push-to-hub", "me/model", "--local-only", "--out", out)
    require_no_secrets(dupr(*call).stderr, out)
