"""`dupr` and `python -m dupr_cli`."""

from __future__ import annotations

from dupr_cli.cli.app import app
from dupr_cli.cli.launch import end_with_launcher


def main() -> None:
    end_with_launcher()
    app()


if __name__ == "__main__":
    main()
