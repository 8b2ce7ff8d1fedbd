"""Watching a run: metrics.jsonl, TensorBoard, the status line, and signs of trouble.

Between log lines nothing is read back from the device; sums stay there until a line is due.
"""

from __future__ import annotations

import math
import signal
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import torch
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter

from dupr_cli.artifacts.run import MetricsLog
from dupr_cli.errors import RunError
from dupr_cli.pretrain.data import Batch
from dupr_cli.pretrain.encoders import Embeddings
from dupr_cli.progress import Reporter
from dupr_cli.recipe.pretrain import PretrainRecipe

# Relative to the spread of random unit vectors, 1 / sqrt(D). Collapsed embeddings are near 0.
_COLLAPSED = 0.02


class StopSignals:
    """SIGINT and SIGTERM set `number`; the loop ends its step, saves and stops.

    A second signal of the same kind acts at once, as without this.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        except ValueError:
            pass  # not the main thread of a Python caller: signals are the caller's
        return self

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.number = number
        signal.signal(number, self._before[number])  # type: ignore[arg-type]

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


class Monitor:
    """Collects what each step reports and writes a line every `log_every` steps."""

    def __init__(
        self,
        out: Path,
        recipe: PretrainRecipe,
        images: int,
        steps: int,
        done: int,
        reporter: Reporter,
    ) -> None:
        self._log, self._recipe, self._reporter = MetricsLog(out), recipe, reporter
        self._images, self._steps = images, steps
        self._board = SummaryWriter(str(out), purge_step=done + 1 if done else None)
        self._sums: dict[str, Tensor] = {}
        self._waited, self._unreadable, self._count, self._timed = 0.0, 0, 0, 0
        self._since = time.perf_counter()
        self._warned_of_collapse = self._warned_of_images = False
        self.status = ""
        self.latest: dict[str, float] = {}

    def __enter__(self) -> Self:
        self._since = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._board.close()

    @torch.no_grad()
    def step(
        self,
        step: int,
        loss: Tensor,
        losses: dict[str, Tensor],
        queries: Embeddings,
        keys: Embeddings,
        valid: Tensor,
        lr: float,
        batch: Batch,
        waited: float,
    ) -> None:
        """Take note of a finished step (counted from 1)."""
        values = {"loss": loss, "overlap": valid.float().mean()}
        values |= {f"loss/{name}": value for name, value in losses.items()}
        for kind, ours, theirs in (
            ("image", queries.image, keys.image),
            ("patch", queries.patch, keys.patch),
        ):
            for level, q in ours.items():
                k = theirs[level].flatten(0, -2)
                q = q.flatten(0, -2)
                values[f"positive_similarity/{kind}/{level}"] = (q * k).sum(1).mean()
                # 1 for embeddings spread over the sphere, 0 for collapsed ones.
                values[f"spread/{kind}/{level}"] = q.std(0).mean() * math.sqrt(q.shape[1])
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        self._count += 1
        self._timed += 1
        self._waited += waited
        self._unreadable += batch.unreadable
        if step % self._recipe.train.log_every == 0 or step == self._steps:
            self._write(step, lr)

    def _write(self, step: int, lr: float) -> None:
        elapsed = time.perf_counter() - self._since
        batch_size = self._recipe.data.batch_size
        line: dict[str, float] = {"step": step, "epoch": step * batch_size / self._images}
        line |= {name: float(value) / self._count for name, value in self._sums.items()}
        line |= {
            "lr": lr,
            "images_per_second": self._timed * batch_size / elapsed,
            "data_wait": self._waited / elapsed,
            "unreadable": float(self._unreadable),
        }
        if not math.isfinite(line["loss"]):
            self._fail(step)
        self._record(line)
        method = self._recipe.method
        parts = [
            f"{kind} {sum(w * line.get(f'loss/{kind}/{v}', 0.0) for v, w in weights.items()):.2f}"
            for kind, weights in (("image", method.image.weights), ("patch", method.patch.weights))
            if any(weights.values())
        ]
        self.status = (
            f"loss {line['loss']:.2f} ({' + '.join(parts)})  lr {lr:.2g}  "
            f"{line['images_per_second']:.0f} images/s"
        )
        self._look_for_trouble(line)
        self._sums, self._count = {}, 0
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._waited, self._timed, self._since = 0.0, 0, time.perf_counter()

    def _record(self, line: dict[str, float]) -> None:
        step = int(line["step"])
        self._log.append(line)
        for name, value in line.items():
            if name != "step":
                self._board.add_scalar(name, value, step)
        self.latest |= line

    def probe(self, step: int, retrieval: dict[str, float]) -> None:
        """Take note of a measurement of held-out patch retrieval."""
        self._restart_clock()  # the time that the probe took is not training time
        if not retrieval:
            return
        self._record({"step": step, **retrieval})
        levels = [name for name in retrieval if name.startswith("retrieval/")]
        text = ", ".join(f"{name.split('/')[1]} {100 * retrieval[name]:.1f}%" for name in levels)
        self._reporter.info(f"step {step}: held-out patch retrieval {text}")

    def require_finite(self, loss: Tensor, step: int) -> None:
        """Raises RunError before a checkpoint of a run that has blown up is written."""
        if not bool(torch.isfinite(loss)):
            self._fail(step)

    def _fail(self, step: int) -> None:
        raise RunError(
            f"the loss is not finite at step {step}. Lower optimizer.lr, lengthen "
            f"optimizer.warmup_steps, or use train.precision: float32. Checkpoints written before "
            f"are kept."
        )

    def _look_for_trouble(self, line: dict[str, float]) -> None:
        flat = [n for n, v in line.items() if n.startswith("spread/") and v < _COLLAPSED]
        if flat and not self._warned_of_collapse:
            self._warned_of_collapse = True
            self._reporter.warning(
                f"step {line['step']:.0f}: the embeddings collapse ({flat[0]} is "
                f"{line[flat[0]]:.3f}, healthy is near 1): nothing is learned any more. Try a "
                f"smaller optimizer.lr or a method.momentum nearer to 1."
            )
        if self._unreadable and not self._warned_of_images:
            self._warned_of_images = True
            self._reporter.warning(
                f"step {line['step']:.0f}: images that cannot be decoded are replaced by others "
                f"(metrics.jsonl counts them as `unreadable`); `dupr prepare` leaves them out."
            )
