"""The training loop, in the order of docs/method.md.

`train` prepares everything, then repeats: take a batch of view pairs and find their shared regions,
update the key encoder by momentum and embed the keys, embed the queries and contrast image and
patch embeddings with their queues at every level, step, push the keys. Everything random in step n
follows from the seed and n, so a run continued from a checkpoint repeats the steps that an
uninterrupted run would have made. The batch may be spread over processes and cut into parts; its
losses, queues and batch-norm groups stay those of the whole batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dupr_cli.artifacts.pixel_formats import PixelFormat
from dupr_cli.artifacts.run import CheckpointState, MetricsLog
from dupr_cli.artifacts.shards import ShardSet
from dupr_cli.models.backbone import as_backbone, load_backbone
from dupr_cli.models.batch_norm import commit_statistics, drop_statistics, group_batch_norms
from dupr_cli.models.published import open_weights
from dupr_cli.pretrain.data import BatchOrder, probe_batches, training_batches
from dupr_cli.pretrain.encoders import Embeddings, join, momentum_update
from dupr_cli.pretrain.method import Dupr, method_class
from dupr_cli.pretrain.monitor import Monitor
from dupr_cli.pretrain.retrieval_check import patch_retrieval
from dupr_cli.pretrain.view_batches import View, make_views
from dupr_cli.progress import Reporter
from dupr_cli.recipe import recipe_digest
from dupr_cli.recipe.pretrain import MethodSection, OptimizerSection, PretrainRecipe
from dupr_cli.runtime.parallel import World, average_gradients
from dupr_cli.runtime.state import TrainingState
from dupr_cli.runtime.stopping import Limits, Stop, stopped
from dupr_cli.views.pairs import ViewPairBatch


def make_model(recipe: PretrainRecipe, world: World) -> Dupr:
    """The method's model on its device, its batch norms with this process's share of the groups."""
    train, norm = recipe.train, recipe.method.batch_norm
    torch.manual_seed(recipe.seed)
    model = method_class(recipe)(recipe)
    groups = 1 if norm.sync else norm.groups // (world.size * train.accumulate)
    group_batch_norms(model, groups, norm.sync)
    model = model.to(world.device)
    if train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    as_backbone(model.query.backbone).recompute = train.activation_checkpointing
    if train.compile:
        model.query.backbone.compile()
        model.key.backbone.compile()
    return model


def start_from_weights(model: Dupr, recipe: PretrainRecipe) -> None:
    """Load `model.init` into both backbones. Raises UsageError for weights that do not fit."""
    if recipe.model.init is not None:
        weights = open_weights(recipe.model.init, recipe.model.backbone)
        for encoder in (model.query, model.key):
            load_backbone(encoder.backbone, weights)


def parts(rows: int, count: int) -> list[slice]:
    """`count` equal slices of `rows` rows."""
    size = rows // count
    return [slice(first, first + size) for first in range(0, rows, size)]


@torch.no_grad()
def embed_keys(
    key: nn.Module, view: View, recipe: PretrainRecipe, world: World, generator: torch.Generator
) -> Embeddings:
    """Key embeddings of this process's images, in the order of the queries.

    Keys go through the encoder in a random order of the global batch, so that the group whose batch
    statistics a key shares reveals nothing about its query; embeddings then return to their place.
    Source: docs/method.md, "Batch norm"; MoCo (arXiv 1911.05722), section 3.3.
    """
    rows = len(view.pixels)
    order = torch.arange(rows * world.size)
    if recipe.method.batch_norm.permute_keys:
        order = torch.randperm(rows * world.size, generator=generator)
    shuffled = view.exchange(order, world)
    embedded = []
    for part in parts(rows, recipe.train.accumulate):
        images = shuffled.part(part).for_encoder(recipe.method, memory_format(recipe))
        with autocast(recipe, world):
            embedded.append(key(*images))
    back = order.argsort()
    return join(embedded).map(lambda values: world.exchange(values, back))


@dataclass(frozen=True)
class StepLosses:
    """Losses of one step, over all its parts. last_pair: queries and keys of the last part."""

    total: Tensor
    losses: dict[str, Tensor]
    last_pair: tuple[Embeddings, Embeddings]


def forward_backward(
    model: Dupr,
    views: Sequence[View],
    keys: Sequence[Embeddings],
    valid: Tensor,
    valid_images: float,
    recipe: PretrainRecipe,
    world: World,
    scaler: torch.amp.GradScaler,
) -> StepLosses:
    """Embed the query views, contrast them with their keys and queues, and add up gradients.

    views: of the queries, one for each direction; keys: the embeddings that answer them. valid:
    (N,) bool, whether an image's views share enough for patches; valid_images: the mean number of
    valid images per process. The batch is cut into `train.accumulate` parts.
    """
    losses: dict[str, Tensor] = {}
    total = torch.zeros((), device=world.device)
    for part in parts(len(valid), recipe.train.accumulate):
        loss = torch.zeros((), device=world.device)
        for view, of_view in zip(views, keys, strict=True):
            images = view.part(part).for_encoder(recipe.method, memory_format(recipe))
            with autocast(recipe, world):
                queries = model.query(*images)
            answers = of_view.part(part)
            found = model.losses(queries, answers, valid[part], len(valid), valid_images)
            loss = loss + model.weighted(found) / len(views)
            for name, value in found.items():
                losses[name] = losses.get(name, 0) + value.detach() / len(views)
        torch.autograd.backward(scaler.scale(loss))
        total += loss.detach()
    return StepLosses(total, losses, (queries, answers))


def memory_format(recipe: PretrainRecipe) -> torch.memory_format:
    return torch.channels_last if recipe.train.channels_last else torch.contiguous_format


def autocast(recipe: PretrainRecipe, world: World) -> torch.autocast:
    precision = getattr(torch, recipe.train.precision)
    return torch.autocast(world.device.type, precision, enabled=precision != torch.float32)


@torch.no_grad()
def push_keys(
    model: Dupr, keys: Sequence[Embeddings], world: World, generator: torch.Generator
) -> None:
    """Feed the queues with the chosen keys of all processes, in the order of the global batch.

    keys: of one or both views. Source: docs/method.md, "Queues".
    """
    patches = max((v.shape[1] for e in keys for v in e.patch.values()), default=1)
    for embeddings in keys:
        rows = len(next(iter((embeddings.image | embeddings.patch).values())))
        scores = torch.rand(rows * world.size, patches, generator=generator)
        own = scores[world.rank * rows : (world.rank + 1) * rows]
        chosen = model.queue_keys(embeddings, own)
        model.push({name: world.gather(values) for name, values in chosen.items()})


def learning_rate(optimizer: OptimizerSection, step: int, steps: int) -> float:
    """Learning rate of a step, counted from 0: linear warm-up, then the schedule over all steps."""
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return optimizer.lr
    progress = (step - optimizer.warmup_steps) / max(1, steps - optimizer.warmup_steps)
    return optimizer.lr * 0.5 * (1 + math.cos(math.pi * progress))


def key_momentum(method: MethodSection, step: int, steps: int) -> float:
    """Momentum of the key encoder in a step, counted from 0.

    Source of the rise: BYOL (arXiv 2006.07733), section 3.2.
    """
    if method.momentum_end is None:
        return method.momentum
    rise = 0.5 * (1 - math.cos(math.pi * step / max(1, steps - 1)))
    return method.momentum + (method.momentum_end - method.momentum) * rise


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random stream of one step, the same in all processes; orders keys and selects patches."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def timed(batches: Iterator[ViewPairBatch]) -> Iterator[tuple[ViewPairBatch, float]]:
    """Batches, each with the seconds that the loop waited for it."""
    while True:
        start = time.perf_counter()
        batch = next(batches)
        yield batch, time.perf_counter() - start


def count_steps(recipe: PretrainRecipe, images: int) -> int:
    """Length of the run in steps. images: in one epoch, without those held out."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    assert recipe.train.epochs is not None
    return max(1, math.ceil(recipe.train.epochs * images / recipe.data.batch_size))


def checkpoint_facts(
    recipe: PretrainRecipe, step: int, pixels: PixelFormat | None
) -> CheckpointState:
    """What a checkpoint records besides its tensors. pixels: of the shards."""
    return CheckpointState(
        step=step,
        architecture=recipe.model.backbone,
        input_mean=list(recipe.method.augmentation.mean),
        input_std=list(recipe.method.augmentation.std),
        input_size=recipe.method.views.size,
        recipe_sha256=recipe_digest(recipe),
        method=recipe.method.title,
        input_range=None if pixels is None else list(pixels.range),
    )


def train(
    recipe: PretrainRecipe,
    shards: ShardSet,
    out: Path,
    world: World,
    reporter: Reporter,
    limits: Limits | None = None,
) -> dict[str, float]:
    """Run or continue a run in `out`; returns the last metrics.

    Raises RunError when too many steps in a row are not finite, and StoppedRunError when it is
    asked to stop before the end; the same call continues.
    """
    method, limits, device = recipe.method, limits or Limits(), world.device
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = recipe.train.tf32
    model = make_model(recipe, world)
    parameters = [p for p in model.query.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        parameters,
        lr=recipe.optimizer.lr,
        momentum=recipe.optimizer.momentum,
        weight_decay=recipe.optimizer.weight_decay,
    )
    half = recipe.train.precision == "float16"
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    state = TrainingState(str(out), out, model, optimizer, scaler, world)
    saved = state.load(reporter)
    done = saved.step if saved else 0
    steps = count_steps(recipe, BatchOrder(shards, recipe).images)
    if done >= steps:
        reporter.info(f"{out} is already complete: {done} steps")
        return MetricsLog(out).latest()
    loader, order = training_batches(shards, recipe, done, world)
    held_out = probe_batches(shards, recipe) if world.is_main else []
    monitor = Monitor(out, recipe, order.images, steps, done, world, reporter)
    if done == 0:
        start_from_weights(model, recipe)
        monitor.probe(0, patch_retrieval(model.query.backbone, held_out, method, device))
    directions = ((0, 1), (1, 0)) if method.symmetric else ((0, 1),)

    with (
        Stop(limits, launched=world.size > 1) as stop,
        closing(loader),  # ends its processes even if an error keeps this frame alive
        monitor,
        reporter.task("pretrain", steps, "steps", done) as progress,
    ):
        batches = timed(loader)
        for step in range(done, steps):
            batch, waited = next(batches)
            generator = step_generator(recipe.seed, step)
            torch.manual_seed(recipe.seed + step * world.size + world.rank)  # a backbone's own
            lr = learning_rate(recipe.optimizer, step, steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            views, valid = make_views(batch, method, device)
            valid_images = max(1.0, float(world.sum(valid.sum()))) / world.size

            momentum_update(model.key, model.query, key_momentum(method, step, steps))
            keys = [
                embed_keys(model.key, views[k], recipe, world, generator) for _, k in directions
            ]

            found = forward_backward(
                model, [views[q] for q, _ in directions], keys, valid, valid_images, recipe,
                world, scaler,
            )  # fmt: skip
            average_gradients(parameters, world)
            scaler.unscale_(optimizer)
            gradients = [p.grad for p in parameters if p.grad is not None]
            gradient_norm = torch.nn.utils.get_total_norm(gradients)

            # float16 gradients may overflow; the scaler then skips the step by itself.
            finite = torch.isfinite(found.total) & (half | torch.isfinite(gradient_norm))
            flags = world.max(torch.tensor([float(not finite), float(stop.code)])).tolist()
            if flags[0]:
                drop_statistics([model])
                monitor.bad_step(step + 1, batch, shards)
            else:
                scaler.step(optimizer)
                commit_statistics([model], world)
                push_keys(model, keys, world, generator)
                monitor.good_step()
                values = {"loss": found.total, "gradient_norm": gradient_norm}
                values |= {f"loss/{name}": value for name, value in found.losses.items()}
                values["overlap"] = valid.float().mean()
                facts = {"lr": lr} | ({"loss_scale": scaler.get_scale()} if half else {})
                monitor.step(step + 1, values, found.last_pair, model, batch, waited, facts)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

            progress.advance(1, monitor.status)
            last, code = step + 1 == steps, int(flags[1])
            stopping = not last and (code or stop.steps_are_done(step + 1 - done))
            if last or stopping or (step + 1) % recipe.train.checkpoint_every == 0:
                state.save(
                    checkpoint_facts(recipe, step + 1, shards.pixels),
                    recipe.train.keep_checkpoints,
                    recipe.train.keep_every,
                )
            if last or (step + 1) % recipe.train.probe_every == 0:
                retrieval = patch_retrieval(model.query.backbone, held_out, method, device)
                monitor.probe(step + 1, retrieval)
            if stopping:
                raise stopped(code, limits, f"step {step + 1} of {steps} is saved in {out}")
    return monitor.latest
