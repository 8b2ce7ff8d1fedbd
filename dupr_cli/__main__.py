"""`dupr` and `python -m dupr_cli`."""

from __future__ import annotations

from dupr_cli.cli.app import app
from dupr_cli.cli.launch import end_with_launcher
from dupr_cli.runtime.stopping import ignore_signals


def main() -> None:
    end_with_launcher()
    try:
        app()
    finally:
        ignore_signals()  # one that comes again must not change how the process ends


if __name__ == "__main__":
    main()
