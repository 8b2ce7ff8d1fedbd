"""One step of pre-training, in the order of docs/method.md.

`Training.step` finds the shared regions of a batch of view pairs, updates the key encoder by
momentum and embeds the keys, embeds the queries and contrasts image and patch embeddings with their
queues at every level, steps, and pushes the keys. Everything random in step n follows from the seed
and n. The batch may be spread over processes and cut into parts; its losses, queues and batch-norm
groups stay those of the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dupr_cli.models.backbone import as_backbone, load_backbone
from dupr_cli.models.batch_norm import commit_statistics, drop_statistics, group_batch_norms
from dupr_cli.models.published import open_weights
from dupr_cli.pretrain.encoders import Embeddings, join, momentum_update
from dupr_cli.pretrain.method import Dupr, method_class
from dupr_cli.pretrain.view_batches import View, make_views
from dupr_cli.recipe.pretrain import MethodSection, OptimizerSection, PretrainRecipe
from dupr_cli.runtime.parallel import World, average_gradients
from dupr_cli.runtime.phases import phase
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
        with autocast(recipe, world), phase("key forward"):
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
            with autocast(recipe, world), phase("query forward"):
                queries = model.query(*images)
            answers = of_view.part(part)
            with phase("losses"):
                found = model.losses(queries, answers, valid[part], len(valid), valid_images)
                loss = loss + model.weighted(found) / len(views)
                for name, value in found.items():
                    losses[name] = losses.get(name, 0) + value.detach() / len(views)
        with phase("backward"):
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


@dataclass(frozen=True)
class Step:
    """What a step gave. values: losses and measures by name, on the device. pair: queries and keys
    of the step's last part. facts: numbers that are known without the device."""

    finite: bool
    stop_code: int
    values: dict[str, Tensor]
    pair: tuple[Embeddings, Embeddings]
    facts: dict[str, float]


class Training:
    """The model of a run, its optimiser, and what one step does with them."""

    def __init__(self, recipe: PretrainRecipe, steps: int, world: World) -> None:
        """steps: length of the run, which the schedules span."""
        self._recipe, self._steps, self._world = recipe, steps, world
        tf32 = recipe.train.tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        self.model = make_model(recipe, world)
        self._parameters = [p for p in self.model.query.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(
            self._parameters,
            lr=recipe.optimizer.lr,
            momentum=recipe.optimizer.momentum,
            weight_decay=recipe.optimizer.weight_decay,
        )
        self._half = recipe.train.precision == "float16"
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self._half)
        self._directions = ((0, 1), (1, 0)) if recipe.method.symmetric else ((0, 1),)

    def step(self, step: int, batch: ViewPairBatch, stop_code: int = 0) -> Step:
        """Train on a batch of this process. step: counted from 0.

        A step whose loss or gradient is not finite changes nothing. stop_code: of this process; the
        result has the highest of all.
        """
        recipe, world, model, method = self._recipe, self._world, self.model, self._recipe.method
        generator = step_generator(recipe.seed, step)
        torch.manual_seed(recipe.seed + step * world.size + world.rank)  # a backbone's own
        lr = learning_rate(recipe.optimizer, step, self._steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with phase("transfer"):
            views, valid = make_views(batch, method, world.device)
        valid_images = max(1.0, float(world.sum(valid.sum()))) / world.size

        with phase("momentum update"):
            momentum_update(model.key, model.query, key_momentum(method, step, self._steps))
        keys = [
            embed_keys(model.key, views[k], recipe, world, generator) for _, k in self._directions
        ]

        queries = [views[q] for q, _ in self._directions]
        found = forward_backward(
            model, queries, keys, valid, valid_images, recipe, world, self.scaler
        )
        with phase("average gradients"):
            average_gradients(self._parameters, world)
        with phase("gradient check"):
            self.scaler.unscale_(self.optimizer)
            gradients = [p.grad for p in self._parameters if p.grad is not None]
            gradient_norm = torch.nn.utils.get_total_norm(gradients)
            # float16 gradients may overflow; the scaler then skips the step by itself.
            finite = torch.isfinite(found.total) & (self._half | torch.isfinite(gradient_norm))
            flags = world.max(torch.tensor([float(not finite), float(stop_code)])).tolist()
        if flags[0]:
            drop_statistics([model])
        else:
            with phase("optimizer"):
                self.scaler.step(self.optimizer)
            with phase("batch-norm statistics"):
                commit_statistics([model], world)
            with phase("queues"):
                push_keys(model, keys, world, generator)
        values = {"loss": found.total, "gradient_norm": gradient_norm}
        values |= {f"loss/{name}": value for name, value in found.losses.items()}
        values["overlap"] = valid.float().mean()
        facts = {"lr": lr} | ({"loss_scale": self.scaler.get_scale()} if self._half else {})
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return Step(not flags[0], int(flags[1]), values, found.last_pair, facts)
