"""`dupr` and `python -m dupr_cli`."""

from __future__ import annotations

import sys


def main() -> None:
    if sys.platform == "win32":  # no file locks, fork servers and signals as used here
        sys.exit("error: dupr does not run on Windows itself. Install it in WSL 2.")
    from dupr_cli.cli.app import app
    from dupr_cli.cli.launch import end_with_launcher
    from dupr_cli.runtime.stopping import ignore_signals

    end_with_launcher()
    try:
        app()
    finally:
        ignore_signals()  # one that comes again must not change how the process ends


if __name__ == "__main__":
    main()
