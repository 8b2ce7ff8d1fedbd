"""One pre-training step in plain PyTorch, written from docs/method.md and from nothing else.

It shares no line with `dupr_cli.pretrain` or `dupr_cli.views`, and takes no short cut: networks are
torchvision's, the groups of batch norm are separate calls, logits exist in full, bins are read
point by point. What is drawn at random (crops, colours, orders, choices) is given to it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as colour
from torch import Tensor, nn

LEVELS = ("res2", "res3", "res4", "res5")
STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
# Columns of the parameters of a view, as docs/formats.md lists them.
BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GRAYSCALE, BLUR, FLIP = range(8)


@dataclass(frozen=True)
class Settings:
    """The values of a recipe, by the names of docs/method.md."""

    size: int
    min_overlap: float
    max_sigma: float
    mean: Sequence[float]
    std: Sequence[float]
    alpha: Mapping[str, float]
    beta: Mapping[str, float]
    bins: Mapping[str, int]
    image_temperature: float
    patch_temperature: float
    groups: int
    permute_keys: bool
    patch_keys: int
    symmetric: bool
    sgd_momentum: float
    weight_decay: float


@dataclass(frozen=True)
class Draws:
    """What a step draws. views: (N, 2, 3, S, S) uint8 crops, not yet mirrored; crops: (N, 2, 4);
    parameters: (N, 2, 8); orders: of the keys, one per direction, (N,); scores: of the patches, one
    per direction, (N, P)."""

    views: Tensor
    crops: Tensor
    parameters: Tensor
    orders: Sequence[Tensor]
    scores: Sequence[Tensor]
    lr: float
    key_momentum: float


def image_of(view: Tensor, parameters: Tensor, settings: Settings) -> Tensor:
    """ "Views": jitter in its order, grayscale, blur, flip, normalise; one image (3, S, S)."""
    x = view.float() / 255
    changes = (
        (colour.adjust_brightness, BRIGHTNESS),
        (colour.adjust_contrast, CONTRAST),
        (colour.adjust_saturation, SATURATION),
        (colour.adjust_hue, HUE),
    )
    if parameters[ORDER] >= 0:
        for number in list(itertools.permutations(range(4)))[int(parameters[ORDER])]:
            change, column = changes[number]
            x = change(x, float(parameters[column]))
    if parameters[GRAYSCALE]:
        x = colour.rgb_to_grayscale(x, 3)
    if parameters[BLUR]:
        reach = max(1, -int(-3 * settings.max_sigma // 1))
        x = colour.gaussian_blur(x, [2 * reach + 1] * 2, [float(parameters[BLUR])] * 2)
    if parameters[FLIP]:
        x = x.flip(2)
    mean, std = (torch.tensor(v)[:, None, None] for v in (settings.mean, settings.std))
    return (x - mean) / std


def shared_box(crops: Tensor, view: int, mirrored: bool, size: int) -> tuple[list[float], bool]:
    """ "Shared region": B in the pixels of one view, and whether it has any area."""
    x0, y0 = (float(crops[:, i].max()) for i in (0, 1))
    x1, y1 = (float(crops[:, i].min()) for i in (2, 3))
    left, top, right, bottom = crops[view].tolist()
    width, height = size / (right - left), size / (bottom - top)
    box = [(x0 - left) * width, (y0 - top) * height, (x1 - left) * width, (y1 - top) * height]
    if mirrored:
        box[0], box[2] = size - box[2], size - box[0]
    return box, x1 > x0 and y1 > y0


def read(features: Tensor, x: float, y: float, stride: int) -> Tensor:
    """Bilinear value (C,) of a map (C, H, W) at a point of the view; borders are continued.

    A ResNet's cell i is centred on pixel i * stride.
    """
    places = []
    for value, cells in ((y, features.shape[1]), (x, features.shape[2])):
        place = min(max((value - 0.5) / stride, 0.0), cells - 1.0)
        low = min(int(place), cells - 1)
        places.append((low, min(low + 1, cells - 1), place - low))
    (top, bottom, down), (left, right, along) = places
    upper = (1 - along) * features[:, top, left] + along * features[:, top, right]
    lower = (1 - along) * features[:, bottom, left] + along * features[:, bottom, right]
    return (1 - down) * upper + down * lower


def bins_of(features: Tensor, box: list[float], mirrored: bool, bins: int, stride: int) -> Tensor:
    """ "Patches": (S * S, C), the mean of two by two points per bin, the grid unmirrored."""
    x0, y0, x1, y1 = box
    width, height = (x1 - x0) / bins, (y1 - y0) / bins
    rows = []
    for i in range(bins):
        for j in range(bins):
            column = bins - 1 - j if mirrored else j
            points = [
                read(features, x0 + (column + u) * width, y0 + (i + v) * height, stride)
                for v in (0.25, 0.75)
                for u in (0.25, 0.75)
            ]
            rows.append(torch.stack(points).mean(0))
    return torch.stack(rows)


def statistics(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


class Side(nn.Module):
    """One of the two encoders, with the names of a checkpoint."""

    def __init__(self, settings: Settings, dim: int) -> None:
        super().__init__()
        self.backbone = torchvision.models.resnet18()
        del self.backbone.fc
        self.seen: list[list[tuple[Tensor, Tensor]]] = []
        channels = dict(zip(LEVELS, (64, 128, 256, 512), strict=True))
        self.image_heads, self.patch_heads = (
            nn.ModuleDict(
                {
                    level: nn.Sequential(
                        nn.Linear(channels[level], channels[level]),
                        nn.ReLU(),
                        nn.Linear(channels[level], dim),
                    )
                    for level in LEVELS
                    if weights.get(level)
                }
            )
            for weights in (settings.alpha, settings.beta)
        )

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        b = self.backbone
        x = b.maxpool(b.relu(b.bn1(b.conv1(images))))
        found = {}
        for level, stage in zip(LEVELS, (b.layer1, b.layer2, b.layer3, b.layer4), strict=True):
            x = found[level] = stage(x)
        return found

    def norms(self) -> list[nn.BatchNorm2d]:
        return [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)]

    def grouped_maps(self, images: Tensor, groups: int) -> dict[str, Tensor]:
        """ "Batch norm": each group by itself, from the running statistics before the step."""
        before = [statistics(n) for n in self.norms()]
        parts = []
        for part in images.chunk(groups):
            for norm, (mean, var) in zip(self.norms(), before, strict=True):
                norm.running_mean, norm.running_var = mean.clone(), var.clone()
            parts.append(self.maps(part))
            self.seen.append([statistics(n) for n in self.norms()])
        for norm, (mean, var) in zip(self.norms(), before, strict=True):
            norm.running_mean, norm.running_var = mean, var
        return {level: torch.cat([part[level] for part in parts]) for level in LEVELS}

    def commit(self) -> None:
        """The running statistics after the step are the mean over all its groups."""
        for i, norm in enumerate(self.norms()):
            norm.running_mean = torch.stack([group[i][0] for group in self.seen]).mean(0)
            norm.running_var = torch.stack([group[i][1] for group in self.seen]).mean(0)
        self.seen.clear()


class Reference:
    """The state of a run and its step.

    state: of a checkpoint before the first step; velocity starts at zero.
    """

    def __init__(self, state: Mapping[str, Tensor], settings: Settings) -> None:
        self.settings = settings
        queues = {n: t.clone() for n, t in state.items() if n.endswith(".keys")}
        self.queues = {
            f"{kind}/{level}": queues[f"{kind}_queues.{level}.keys"]
            for kind, weights in (("image", settings.alpha), ("patch", settings.beta))
            for level in LEVELS
            if weights.get(level)
        }
        dim = next(iter(self.queues.values())).shape[1]
        self.query, self.key = Side(settings, dim), Side(settings, dim)
        for name, side in (("query.", self.query), ("key.", self.key)):
            own = {n.removeprefix(name): t for n, t in state.items() if n.startswith(name)}
            side.load_state_dict(copy.deepcopy(own))
            side.train()
        self.velocity = {n: torch.zeros_like(p) for n, p in self.query.named_parameters()}
        self.places = dict.fromkeys(self.queues, 0)

    def embed(
        self, side: Side, images: Tensor, boxes: list[list[float]], mirrored: list[bool]
    ) -> dict[str, Tensor]:
        """Unit embeddings of a batch by kind and level: (N, D) of images, (N, P, D) of patches."""
        s = self.settings
        maps = side.grouped_maps(images, s.groups)
        found = {}
        for level in LEVELS:
            if s.alpha.get(level):
                v = side.image_heads[level](maps[level].mean((2, 3)))
                found[f"image/{level}"] = v / v.norm(dim=-1, keepdim=True)
            if s.beta.get(level):
                pooled = torch.stack(
                    [
                        bins_of(one, box, flip, s.bins[level], STRIDES[level])
                        for one, box, flip in zip(maps[level], boxes, mirrored, strict=True)
                    ]
                )
                r = side.patch_heads[level](pooled)
                found[f"patch/{level}"] = r / r.norm(dim=-1, keepdim=True)
        return found

    def contrast(self, name: str, queries: Tensor, keys: Tensor) -> Tensor:
        """ "Losses": -log softmax of each positive among its queue, (M,)."""
        s = self.settings
        tau = s.image_temperature if name.startswith("image") else s.patch_temperature
        positive = (queries * keys).sum(-1, keepdim=True)
        logits = torch.cat([positive, queries @ self.queues[name].T], dim=-1) / tau
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long), reduction="none")

    def step(self, draws: Draws) -> dict[str, float]:
        """Returns the losses by kind/level, not weighted, and their weighted sum as "loss"."""
        s, count = self.settings, len(draws.views)
        mirrored = draws.parameters[..., FLIP].bool()
        images, boxes, valid = [], [], torch.ones(count, dtype=torch.bool)
        for view in range(2):
            images.append(
                torch.stack(
                    [image_of(draws.views[n, view], draws.parameters[n, view], s)
                     for n in range(count)]
                )
            )  # fmt: skip
            of_view = []
            for n in range(count):
                box, area = shared_box(draws.crops[n], view, bool(mirrored[n, view]), s.size)
                shares = ((box[2] - box[0]) / s.size, (box[3] - box[1]) / s.size)
                valid[n] &= area and min(shares) >= s.min_overlap - 1e-4
                of_view.append(box)
            boxes.append(of_view)
        whole = [0.0, 0.0, float(s.size), float(s.size)]
        boxes = [[box if valid[n] else whole for n, box in enumerate(of_view)] for of_view in boxes]
        flips = [mirrored[:, view].tolist() for view in range(2)]

        with torch.no_grad():
            for key, query in zip(self.key.parameters(), self.query.parameters(), strict=True):
                key.copy_(draws.key_momentum * key + (1 - draws.key_momentum) * query)
        directions = [(0, 1), (1, 0)] if s.symmetric else [(0, 1)]
        all_keys = []
        for (_, answer), order in zip(directions, draws.orders, strict=True):
            chosen = order.tolist() if s.permute_keys else list(range(count))
            with torch.no_grad():
                shuffled = self.embed(
                    self.key, images[answer][chosen],
                    [boxes[answer][n] for n in chosen], [flips[answer][n] for n in chosen],
                )  # fmt: skip
            back = [chosen.index(n) for n in range(count)]
            all_keys.append({name: values[back] for name, values in shuffled.items()})

        losses: dict[str, Tensor] = {}
        for (asks, _), keys in zip(directions, all_keys, strict=True):
            queries = self.embed(self.query, images[asks], boxes[asks], flips[asks])
            for name, q in queries.items():
                k = keys[name]
                if name.startswith("image"):
                    value = self.contrast(name, q, k).mean()
                else:
                    per_image = self.contrast(name, q.flatten(0, 1), k.flatten(0, 1))
                    per_image = per_image.view(q.shape[:2]).mean(1)
                    value = per_image[valid].sum() / max(1, int(valid.sum()))
                losses[name] = losses.get(name, torch.zeros(())) + value / len(directions)
        weights = {f"image/{v}": w for v, w in s.alpha.items()}
        weights |= {f"patch/{v}": w for v, w in s.beta.items()}
        total = torch.stack([weights[name] * value for name, value in losses.items()]).sum()

        named = dict(self.query.named_parameters())
        gradients = torch.autograd.grad(total, list(named.values()))
        with torch.no_grad():
            for (name, p), g in zip(named.items(), gradients, strict=True):
                self.velocity[name] = s.sgd_momentum * self.velocity[name] + g + s.weight_decay * p
                p.sub_(draws.lr * self.velocity[name])
        self.query.commit()
        self.key.commit()
        for keys, scores in zip(all_keys, draws.scores, strict=True):
            self.push(keys, scores)
        return {name: float(value) for name, value in losses.items()} | {"loss": float(total)}

    def push(self, keys: Mapping[str, Tensor], scores: Tensor) -> None:
        """ "Queues": every image key; of each image the patch keys with the highest scores."""
        for name, values in keys.items():
            entering = list(values)
            if name.startswith("patch"):
                entering = [
                    of_image[place]
                    for of_image, row in zip(values, scores, strict=True)
                    for place in row[: len(of_image)]
                    .argsort(descending=True)[: self.settings.patch_keys]
                    .tolist()
                ]
            for key in entering:
                self.queues[name][self.places[name] % len(self.queues[name])] = key
                self.places[name] += 1
