"""The command line in this process, for tests that are not about processes and signals.

Starting Python and importing torch costs seconds; Typer's own runner parses, runs and exits as the
program does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import typer
from typer.testing import CliRunner, Result

from dupr_cli.cli.app import app
from tests.support.recipes import SMALL_NETWORK, TINY

TINY_SET = [argument for override in TINY for argument in ("--set", override)]

RESNET18 = ("--set", "model.backbone=resnet18")


def dupr(*arguments: object, code: int = 0, env: dict[str, str] | None = None) -> Result:
    """Run `dupr ARGUMENTS`; fails unless it exits with `code`, and on any traceback."""
    runner = CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1", **(env or {})})
    done = runner.invoke(app, [*map(str, arguments)])
    assert isinstance(done.exception, SystemExit | None), done.exception
    assert done.exit_code == code, done.stdout + done.stderr
    doubled = re.search(r"(?<!\.)[.,:;!][.,:;!?](?=\s|$)", done.stderr)
    assert doubled is None, done.stderr
    assert "Traceback" not in done.stderr
    return done


def pretrain(data: object, out: object, *more: object, code: int = 0, **env: str) -> Result:
    """`dupr pretrain` with the smallest recipe and network."""
    return dupr(
        "pretrain", "dupr-r18-cpu-smoke", "--data", data, "--out", out, *TINY_SET,
        "--set", SMALL_NETWORK, *more, code=code, env=env,
    )  # fmt: skip


def _commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that runs something, with the words that call it."""
    if not hasattr(command, "commands"):
        yield words, command
        return
    for name, child in command.commands.items():
        # `dupr prepare` is a group whose own command has a name that nobody types.
        yield from _commands(child, words if name == "run" else (*words, name))


COMMANDS = dict(_commands(typer.main.get_command(app)))
