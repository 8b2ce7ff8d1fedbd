"""`dupr` and `python -m dupr_cli`."""

from __future__ import annotations

from dupr_cli.cli.app import app


def main() -> None:
    app()


if __name__ == "__main__":
    main()
