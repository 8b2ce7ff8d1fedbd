"""Reporters for Python programs."""

from __future__ import annotations

import logging

import pytest

from dupr_cli.progress import LoggingReporter


def test_progress_is_logged_at_intervals_and_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    now = [100.0]
    reporter = LoggingReporter(seconds=10, clock=lambda: now[0])
    with caplog.at_level(logging.DEBUG, "dupr"), reporter.task("train", 40, "steps", 10) as task:
        for _ in range(30):
            now[0] += 2
            task.advance(1, "loss 1")
    lines = [record.message for record in caplog.records]
    assert len(lines) == 6
    assert lines[0] == "train 15/40 steps  0.5/s  0:50 left  loss 1"
    assert lines[-1] == "train 40/40 steps  done  loss 1"


def test_messages_have_levels_and_hold_no_secrets(caplog: pytest.LogCaptureFixture) -> None:
    reporter = LoggingReporter()
    with caplog.at_level(logging.DEBUG, "dupr"):
        reporter.info("https://me:secret@host/a.tar")
        reporter.detail("one\nline")
        reporter.warning("100%")
    assert [record.levelname for record in caplog.records] == ["INFO", "DEBUG", "WARNING"]
    assert "secret" not in caplog.text
    assert "\n" not in caplog.records[1].message
    assert caplog.records[2].message == "100%"
