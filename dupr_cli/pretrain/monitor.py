"""Monitor a run: metrics.jsonl, TensorBoard, trackers, the status line, and signs of trouble.

All processes collect values; at a log step the values are averaged over the processes, and rank 0
writes them. Between log steps the device is only asked whether a step was finite.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import torch
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter

from dupr_cli.artifacts.files import write_json
from dupr_cli.artifacts.run import LEARNING, MetricsLog
from dupr_cli.artifacts.shards import ShardSet
from dupr_cli.errors import RunError
from dupr_cli.pretrain.encoders import Embeddings
from dupr_cli.pretrain.method import Dupr
from dupr_cli.pretrain.retrieval_check import RETRIEVAL, describe_retrieval, short_retrieval
from dupr_cli.pretrain.trackers import Trackers
from dupr_cli.progress import Reporter
from dupr_cli.recipe.base import Level
from dupr_cli.recipe.pretrain import PretrainRecipe
from dupr_cli.runtime.machine import peak_memory_bytes
from dupr_cli.runtime.parallel import World
from dupr_cli.views.pairs import ViewPairBatch

# Spread relative to that of random unit vectors, 1 / sqrt(D). Collapsed embeddings are near 0.
_COLLAPSED = 0.02
# Before this many steps, no run is expected to have learned anything.
_SOON = 300
_POOL = "retrieval_pool/"
# Embeddings whose pairwise distances are averaged for uniformity.
_PAIRED = 512


@torch.no_grad()
def diagnostics(
    model: Dupr, queries: Embeddings, keys: Embeddings, queue: str
) -> dict[str, Tensor]:
    """Label-free measures of the embeddings of one kind and level. queue: kind/level.

    positive, negative: mean similarity of queries with their keys and with the queue. spread: mean
    standard deviation per dimension, relative to random unit vectors: 1 is healthy, 0 is collapse.
    alignment: mean squared distance of positives; uniformity: log of the mean Gaussian potential of
    query pairs, about -4 at best (Wang and Isola, arXiv 2005.10242, section 4). other_bins: of
    patches, mean similarity with the keys of the other bins of the same image; where it is as high
    as `positive`, the patch loss tells images apart and not places.
    """
    kind, name = queue.split("/")
    level = cast("Level", name)
    q = (queries.image if kind == "image" else queries.patch)[level].detach()
    k = (keys.image if kind == "image" else keys.patch)[level]
    found = {}
    if kind == "patch" and q.shape[1] > 1:
        patches = q.shape[1]
        every = (q.sum(1) * k.sum(1)).sum(1)  # (N,) over all pairs of bins
        own = (q * k).sum((1, 2))
        found["other_bins"] = ((every - own) / (patches * (patches - 1))).mean()
    q, k = q.flatten(0, -2), k.flatten(0, -2)
    positive = (q * k).sum(1).mean()
    some = q[:: max(1, len(q) // _PAIRED)][:_PAIRED]
    return found | {
        "positive": positive,
        "negative": q.mean(0) @ model.queues()[queue].mean(0),
        "spread": q.std(0).mean() * math.sqrt(q.shape[1]),
        "alignment": 2 - 2 * positive,
        "uniformity": torch.pdist(some).square().mul(-2).exp().mean().log(),
    }


class Monitor:
    """Collects what each step reports and writes a line every `log_every` steps."""

    def __init__(
        self,
        out: Path,
        recipe: PretrainRecipe,
        images: int,
        steps: int,
        done: int,
        world: World,
        reporter: Reporter,
        trackers: Trackers,
    ) -> None:
        self._trackers = trackers
        self._out, self._log, self._recipe = out, MetricsLog(out), recipe
        self._world, self._reporter = world, reporter
        self._images, self._steps = images, steps
        self._board = (
            SummaryWriter(str(out), purge_step=done + 1 if done else None)
            if world.is_main
            else None
        )
        self._sums: dict[str, Tensor] = {}
        self._waited, self._unreadable, self._count, self._timed = 0.0, 0, 0, 0
        self._bad_in_a_row, self._bad = 0, 0
        self._since = time.perf_counter()
        self._warned: set[str] = set()
        probes = [
            line for line in self._log.read() if any(n.startswith("retrieval/") for n in line)
        ]
        self._untrained: dict[str, float] = probes[0] if probes else {}
        self._retrieval = short_retrieval(probes[-1]) if probes else ""
        self._losses = ""
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
        if self._board is not None:
            self._board.close()

    @property
    def status(self) -> str:
        """The last retrieval, the losses, the learning rate and the speed, in this order."""
        return "  ".join(part for part in (self._retrieval, self._losses) if part)

    def is_due(self, step: int) -> bool:
        """Whether a line is written after `step` (counted from 1)."""
        return step % self._recipe.train.log_every == 0 or step == self._steps

    @torch.no_grad()
    def step(
        self,
        step: int,
        values: dict[str, Tensor],
        embeddings: tuple[Embeddings, Embeddings],
        model: Dupr,
        batch: ViewPairBatch,
        waited: float,
        facts: dict[str, float],
    ) -> None:
        """Record a finished step (counted from 1).

        values: sums over the steps of a line, averaged. embeddings: queries and keys of the step's
        last part. facts: written unchanged.
        """
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        self._count += 1
        self._timed += 1
        self._waited += waited
        self._unreadable += batch.unreadable
        if self.is_due(step):
            found = {
                f"{name}/{queue}": value
                for queue in model.queues()
                for name, value in diagnostics(model, *embeddings, queue).items()
            }
            self._write(step, found, self._queue_facts(model) | facts)

    def _queue_facts(self, model: Dupr) -> dict[str, float]:
        facts = {}
        for kind, queues in (("image", model.image_queues), ("patch", model.patch_queues)):
            for level in queues:
                queue = queues[level]
                facts[f"queue_fill/{kind}/{level}"] = queue.fill()
                # The loss of a network that cannot tell the positive from the keys in the queue.
                facts[f"reference/{kind}/{level}"] = math.log(1 + len(queue.keys))
        return facts

    def _write(self, step: int, found: dict[str, Tensor], facts: dict[str, float]) -> None:
        elapsed = time.perf_counter() - self._since
        batch_size = self._recipe.data.batch_size
        names = [*self._sums, *found, "data_wait", "unreadable"]
        own = [float(value) / self._count for value in self._sums.values()]
        own += [*map(float, found.values()), self._waited / elapsed, float(self._unreadable)]
        mean = self._world.sum(torch.tensor(own, dtype=torch.float64)) / self._world.size
        line: dict[str, float] = {"step": step, "epoch": step * batch_size / self._images}
        line |= dict(zip(names, mean.tolist(), strict=True))
        line |= {
            **facts,
            "unreadable": line["unreadable"] * self._world.size,
            "bad_steps": float(self._bad),
            "images_per_second": self._timed * batch_size / elapsed,
            **_memory(self._world.device),
        }
        self._record(line)
        method = self._recipe.method
        parts = [
            f"{kind} {sum(w * line.get(f'loss/{kind}/{v}', 0.0) for v, w in weights.items()):.2f}"
            for kind, weights in (("image", method.image.weights), ("patch", method.patch.weights))
            if any(weights.values())
        ]
        self._losses = (
            f"loss {line['loss']:.2f}  {' + '.join(parts)}  lr {line['lr']:.2g}  "
            f"{line['images_per_second']:.0f} images/s"
        )
        self._look_for_trouble(line)
        self._sums, self._count = {}, 0
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._waited, self._timed, self._since = 0.0, 0, time.perf_counter()

    def _record(self, line: dict[str, float]) -> None:
        if self._board is None:
            return
        # JSON cannot express infinities or NaN.
        line = {name: value for name, value in line.items() if math.isfinite(value)}
        step = int(line["step"])
        self._log.append(line)
        for name, value in line.items():
            if name != "step":
                self._board.add_scalar(name, value, step)
        self._trackers.record(step, {k: v for k, v in line.items() if k != "step"})
        self.latest |= line

    def probe(self, step: int, retrieval: dict[str, float]) -> None:
        """Record a measurement of held-out patch retrieval."""
        self._restart_clock()  # the retrieval check is not training time
        if not retrieval:
            return
        self._record({"step": step, **retrieval})
        self._retrieval = short_retrieval(retrieval)
        shares = {name: v for name, v in retrieval.items() if not name.startswith(_POOL)}
        levels = [name.split("/")[1] for name in shares if name.startswith(f"{RETRIEVAL['all']}/")]
        text = ", ".join(describe_retrieval(shares, level) for level in levels)
        self._reporter.info(f"step {step}: held-out patch retrieval {text}")
        if not self._untrained:
            self._untrained = retrieval
        else:
            self._look_for_stall(step, shares, levels)

    def _look_for_stall(self, step: int, shares: dict[str, float], levels: list[str]) -> None:
        """Warn when patches are not found more often than by the untrained network."""
        advice = (
            "Look at the loss parts in metrics.jsonl; try another optimizer.lr, a shorter "
            "method.queue_length, or a lower method.momentum for such a short run."
        )

        def named(measures: list[str]) -> str:
            return ", ".join(
                f"{v.removeprefix('retrieval/')} {100 * shares[v]:.1f}% "
                f"(untrained {100 * self._untrained.get(v, 0):.1f}%)"
                for v in measures
            )

        overall = [f"{RETRIEVAL['all']}/{level}" for level in levels]
        if step >= max(_SOON, self._steps / 4):
            flat = [v for v in shares if shares[v] < LEARNING * self._untrained.get(v, 0)]
            if all(name in flat for name in overall):
                self._warn(
                    "stall",
                    f"step {step}: patch retrieval is no better than the untrained network's. "
                    f"{advice}",
                )
            elif flat:
                self._warn(
                    "stall of a case",
                    f"step {step}: a part of patch retrieval is no better than the untrained "
                    f"network's, although the rest is: {named(flat)}.",
                )
        elif step == self._steps and all(shares[v] < self._untrained.get(v, 0) for v in overall):
            # Too short to expect anything; a clear loss is still worth a word.
            self._warn(
                "stall",
                f"step {step}: patch retrieval has fallen below the untrained network's: "
                f"{named(overall)}. "
                f"{step} steps are few; if a longer run starts like this, "
                f"{advice[0].lower()}{advice[1:]}",
            )

    def bad_step(self, step: int, batch: ViewPairBatch, shards: ShardSet) -> None:
        """Record a step that was skipped because its loss or gradient was not finite.

        Raises RunError after train.max_bad_steps of them in a row, and writes the keys of the last
        batch's samples beside the run.
        """
        self._bad += 1
        self._bad_in_a_row += 1
        self._warn(
            "finite",
            f"step {step}: the loss or its gradient is not finite; the step is skipped "
            f"(metrics.jsonl counts them as `bad_steps`).",
        )
        if self._bad_in_a_row < self._recipe.train.max_bad_steps:
            return
        numbers = self._world.gather(batch.numbers).tolist()
        file = self._out / f"not-finite-step-{step:08d}.json"
        if self._world.is_main:
            places = [shards.place(number) for number in numbers]
            samples = [
                {"shard": shards.shards[shard].name, "key": shards.index(shard).keys[position]}
                for shard, position in places
            ]
            write_json(file, {"step": step, "samples": samples})
        raise RunError(
            f"the loss or its gradient was not finite in {self._bad_in_a_row} steps in a row, up "
            f"to step {step}. Lower optimizer.lr, lengthen optimizer.warmup_steps, or use "
            f"train.precision: float32. The samples of the last batch are listed in {file}; "
            f"earlier checkpoints are kept."
        )

    def good_step(self) -> None:
        """Record a step that succeeded."""
        self._bad_in_a_row = 0

    def _warn(self, what: str, message: str) -> None:
        if what not in self._warned and self._world.is_main:
            self._warned.add(what)
            self._reporter.warning(message)

    def _look_for_trouble(self, line: dict[str, float]) -> None:
        flat = [n for n, v in line.items() if n.startswith("spread/") and v < _COLLAPSED]
        if flat:
            self._warn(
                "collapse",
                f"step {line['step']:.0f}: the embeddings collapse ({flat[0]} is "
                f"{line[flat[0]]:.3f}, healthy is near 1): the run has stopped learning. Try a "
                f"smaller optimizer.lr or a method.momentum nearer to 1.",
            )
        if line["unreadable"]:
            self._warn(
                "images",
                f"step {line['step']:.0f}: images that cannot be decoded are replaced by others "
                f"(metrics.jsonl counts them as `unreadable`); `dupr prepare` skips such images.",
            )


def _memory(device: torch.device) -> dict[str, float]:
    """Peak memory of this process in GiB, in main memory and on its GPU."""
    facts = {"memory/process_gib": peak_memory_bytes() / 2**30}
    if device.type == "cuda":
        facts["memory/gpu_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return facts
