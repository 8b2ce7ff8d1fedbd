"""Makes two figures of the README from a finished `dupr demo`: patch matches, and a terminal.

    dupr demo --out dupr-demo
    python docs/site/capture.py dupr-demo

Both show real commands: docs/figures/matches.png is the picture that the first one writes, and
docs/figures/terminal.svg what each of them prints. Progress is left out, as it goes to standard
error.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from rich.console import Console
from rich.text import Text

FIGURES = Path(__file__).parents[1] / "figures"
WIDTH = 92
# The scene is one of those that pre-training has not seen.
COMMANDS = (
    "dupr inspect matches dupr-demo/run dupr-demo/VOC2026/JPEGImages/val_000011.jpg"
    " --count 0 --seed 1 --out matches.png",
    "dupr evaluate voc dupr-demo/run none --frozen --recipe demo-frozen"
    " --data dupr-demo/VOC2026 --set data.labels=100 --seeds 3 --out results",
)


def main(demo: Path) -> None:
    console = Console(record=True, width=WIDTH, file=StringIO(), force_terminal=True)
    # Commands run in a folder of their own, so that they show no other paths.
    with TemporaryDirectory() as folder:
        (Path(folder) / "dupr-demo").symlink_to(demo.resolve())
        for command in COMMANDS:
            console.print(f"[bold green]$[/] [bold]{command}[/]", highlight=False)
            console.print(Text.from_ansi(printed(command, folder).rstrip()), end="\n\n")
        # In full colour the picture is twice as large; dithering hides the steps of a palette.
        matches = Image.open(Path(folder) / "matches.png").convert("RGB")
        palette = matches.quantize(128)
        matches.quantize(128, palette=palette).save(FIGURES / "matches.png", optimize=True)
    svg = console.export_svg(title="dupr")
    # Rich loads a font from elsewhere, which no figure should need.
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    (FIGURES / "terminal.svg").write_text(svg.replace("Fira Code, ", ""), encoding="utf-8")


def printed(command: str, folder: str) -> str:
    _, *words = shlex.split(command)
    done = subprocess.run(
        [sys.executable, "-m", "dupr_cli", *words],
        cwd=folder, stdout=subprocess.PIPE, text=True, check=True,
        env={**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(WIDTH)},
    )  # fmt: skip
    return done.stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]))
