"""The training loop of DUPR, from top to bottom as docs/method.md tells it.

`pretrain` prepares everything, then repeats: take a batch of view pairs, augment them, find the
shared region, embed the queries, update the key encoder by momentum and embed the keys, contrast
image and patch embeddings with their queues at every level, step, push the keys. Everything random
in step n follows from the seed and n, so a run continued from a checkpoint repeats the steps that
an uninterrupted run would have made.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dupr_cli.artifacts.run import MetricsLog
from dupr_cli.artifacts.shards import ShardSet
from dupr_cli.errors import InterruptedRunError
from dupr_cli.pretrain.augmentation import FLIP, augment
from dupr_cli.pretrain.checkpoint import continue_run, save_run
from dupr_cli.pretrain.data import Batch, BatchOrder, probe_batches, training_batches
from dupr_cli.pretrain.encoders import Embeddings, Encoder, KeyQueues, momentum_update
from dupr_cli.pretrain.geometry import shared_region_boxes
from dupr_cli.pretrain.losses import info_nce, masked_mean
from dupr_cli.pretrain.monitor import Monitor, StopSignals
from dupr_cli.pretrain.probe import patch_retrieval
from dupr_cli.progress import Reporter
from dupr_cli.recipe.pretrain import MethodSection, OptimizerSection, PretrainRecipe


class Dupr(nn.Module):
    """Everything that a checkpoint must hold: both encoders and all queues."""

    def __init__(self, recipe: PretrainRecipe) -> None:
        super().__init__()
        method, generator = recipe.method, torch.Generator().manual_seed(recipe.seed)
        self.query, self.key = Encoder(recipe), Encoder(recipe)
        self.key.load_state_dict(self.query.state_dict())
        self.key.requires_grad_(False)
        shape = method.queue_length, method.embedding_dim
        self.image_queues = KeyQueues(self.query.image_levels, *shape, generator)
        self.patch_queues = KeyQueues(self.query.patch_levels, *shape, generator)


@dataclass(frozen=True)
class Views:
    """One of the two views of a batch, ready for an encoder.

    images: (N, 3, S, S) normalised. boxes: (N, 4) shared region in view pixels. flips: (N,) bool.
    """

    images: Tensor
    boxes: Tensor
    flips: Tensor

    def select(self, rows: Tensor) -> Views:
        return Views(self.images[rows], self.boxes[rows], self.flips[rows])


def make_views(
    batch: Batch, method: MethodSection, device: torch.device, memory_format: torch.memory_format
) -> tuple[Views, Views, Tensor]:
    """Augmented query and key views of a batch, and valid (N,) bool: enough is shared for patches.

    Source: docs/method.md, "Views" and "Shared region".
    """
    flips = batch.parameters[..., FLIP].bool()
    boxes, valid = shared_region_boxes(
        batch.crops, flips, method.views.size, method.views.min_overlap
    )
    flips, boxes, valid = (t.to(device, non_blocking=True) for t in (flips, boxes, valid))
    pixels = batch.views.to(device, non_blocking=True)
    first, second = (
        Views(
            augment(pixels[:, i], batch.parameters[:, i], method.augmentation).contiguous(
                memory_format=memory_format
            ),
            boxes[:, i],
            flips[:, i],
        )
        for i in range(2)
    )
    return first, second, valid


@torch.no_grad()
def embed_keys(key: Encoder, views: Views, permute: bool, generator: torch.Generator) -> Embeddings:
    """Key embeddings, in the order of the queries.

    Keys go through the encoder in a random order, so that the group whose batch statistics a key
    shares says nothing about its query.
    Source: docs/method.md, "Batch norm"; MoCo (arXiv 1911.05722), section 3.3.
    """
    if not permute:
        embeddings: Embeddings = key(views.images, views.boxes, views.flips)
        return embeddings
    order = torch.randperm(len(views.images), generator=generator).to(views.images.device)
    shuffled = views.select(order)
    embeddings = key(shuffled.images, shuffled.boxes, shuffled.flips)
    return embeddings.select(order.argsort())


def reid_losses(
    model: Dupr, queries: Embeddings, keys: Embeddings, valid: Tensor, method: MethodSection
) -> dict[str, Tensor]:
    """The image loss and the patch loss of each level, not yet weighted.

    valid: (N,) bool, images that take part in the patch loss.
    Source: docs/method.md, "Losses".
    """
    losses = {}
    for level, q in queries.image.items():
        negatives = model.image_queues[level].keys
        losses[f"image/{level}"] = info_nce(
            q, keys.image[level], negatives, method.image.temperature
        ).mean()
    for level, q in queries.patch.items():
        negatives = model.patch_queues[level].keys
        per_patch = info_nce(
            q.flatten(0, 1),
            keys.patch[level].flatten(0, 1),
            negatives,
            method.patch.temperature,
        )
        losses[f"patch/{level}"] = masked_mean(per_patch.view(q.shape[:2]), valid)
    return losses


def total_loss(losses: dict[str, Tensor], method: MethodSection) -> Tensor:
    """Sum over levels of alpha * image loss + beta * patch loss."""
    weights = {f"image/{level}": alpha for level, alpha in method.image.weights.items()}
    weights |= {f"patch/{level}": beta for level, beta in method.patch.weights.items()}
    total = torch.zeros((), device=next(iter(losses.values())).device)
    for name, loss in losses.items():
        total = total + weights[name] * loss
    return total


@torch.no_grad()
def push_keys(model: Dupr, keys: Embeddings, per_image: int, generator: torch.Generator) -> None:
    """Feed the queues: every image key, and `per_image` random patch keys of each image.

    Source: docs/method.md, "Queues".
    """
    for level, values in keys.image.items():
        model.image_queues[level].push(values)
    for level, values in keys.patch.items():
        images, patches, _ = values.shape
        scores = torch.rand(images, patches, generator=generator)
        chosen = scores.topk(per_image, dim=1).indices.to(values.device)
        rows = torch.arange(images, device=values.device)[:, None]
        model.patch_queues[level].push(values[rows, chosen].flatten(0, 1))


def learning_rate(optimizer: OptimizerSection, step: int, steps: int) -> float:
    """Learning rate of a step, counted from 0: linear warm-up, then the schedule over all steps."""
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return optimizer.lr
    progress = (step - optimizer.warmup_steps) / max(1, steps - optimizer.warmup_steps)
    return optimizer.lr * 0.5 * (1 + math.cos(math.pi * progress))


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random stream of one step: key order and patch choice."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def timed(batches: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
    """Batches, each with the seconds that the loop waited for it."""
    while True:
        start = time.perf_counter()
        batch = next(batches)
        yield batch, time.perf_counter() - start


def count_steps(recipe: PretrainRecipe, images: int) -> int:
    """Length of the run in steps. images: of one epoch, without those held out."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    assert recipe.train.epochs is not None
    return max(1, math.ceil(recipe.train.epochs * images / recipe.data.batch_size))


def train(
    recipe: PretrainRecipe, shards: ShardSet, out: Path, device: torch.device, reporter: Reporter
) -> dict[str, float]:
    """Run or continue a run in `out`; returns the last metrics.

    Raises RunError when a loss is not finite, InterruptedRunError after a signal, each at a point
    from which the same call continues.
    """
    method, precision = recipe.method, getattr(torch, recipe.train.precision)
    memory_format = torch.channels_last if recipe.train.channels_last else torch.contiguous_format
    torch.manual_seed(recipe.seed)
    model = Dupr(recipe).to(device)
    model = model.to(memory_format=memory_format)
    optimizer = torch.optim.SGD(
        model.query.parameters(),
        lr=recipe.optimizer.lr,
        momentum=recipe.optimizer.momentum,
        weight_decay=recipe.optimizer.weight_decay,
    )
    done = continue_run(out, model, optimizer, reporter)
    steps = count_steps(recipe, BatchOrder(shards, recipe).images)
    if done >= steps:
        reporter.info(f"{out} is complete: {done} steps")
        return MetricsLog(out).latest()
    loader, order = training_batches(shards, recipe, done, pin_memory=device.type == "cuda")
    held_out = probe_batches(shards, recipe)
    monitor = Monitor(out, recipe, order.images, steps, done, reporter)
    if done == 0:
        monitor.probe(0, patch_retrieval(model.query.backbone, held_out, method, device))

    with (
        StopSignals() as stop,
        monitor,
        reporter.task("pretrain", steps, "steps", done) as progress,
    ):
        batches = timed(iter(loader))
        for step in range(done, steps):
            batch, waited = next(batches)
            generator = step_generator(recipe.seed, step)
            lr = learning_rate(recipe.optimizer, step, steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

            query_views, key_views, valid = make_views(batch, method, device, memory_format)
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                queries = model.query(query_views.images, query_views.boxes, query_views.flips)
                momentum_update(model.key, model.query, method.momentum)
                keys = embed_keys(model.key, key_views, method.batch_norm.permute_keys, generator)
            losses = reid_losses(model, queries, keys, valid, method)
            loss = total_loss(losses, method)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            push_keys(model, keys, method.patch_keys_per_image, generator)

            monitor.step(step + 1, loss, losses, queries, keys, valid, lr, batch, waited)
            progress.advance(1, monitor.status)
            last, stopped = step + 1 == steps, stop.number
            if last or stopped is not None or (step + 1) % recipe.train.checkpoint_every == 0:
                monitor.require_finite(loss, step + 1)
                save_run(out, model, optimizer, recipe, step + 1)
            if last or (step + 1) % recipe.train.probe_every == 0:
                retrieval = patch_retrieval(model.query.backbone, held_out, method, device)
                monitor.probe(step + 1, retrieval)
            if stopped is not None and not last:
                raise InterruptedRunError(
                    f"stopped by a signal; step {step + 1} is saved in {out}. "
                    f"The same command continues from there.",
                    stopped,
                )
    return monitor.latest
