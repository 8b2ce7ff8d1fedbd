"""The smallest recipes: every code path in a fraction of a second."""

from __future__ import annotations

from dupr_cli.recipe import EvaluateRecipe

# The method at its smallest: one epoch step takes a fraction of a second.
TINY = (
    "method.views.size=32",
    "method.patch.bins.res4=2",
    "method.patch.bins.res5=1",
    "method.queue_length=64",
    "method.batch_norm.groups=2",
    "method.embedding_dim=16",
    "data.batch_size=8",
    "data.holdout=8",
    "data.workers=0",
    "optimizer.warmup_steps=2",
    "train.steps=6",
    "train.log_every=2",
    "train.probe_every=3",
    "train.checkpoint_every=2",
)


# A ResNet of 0.4 million parameters, for runs whose network is not what is tested: a checkpoint
# of a ResNet-18 is 140 MB to write and to flush.
SMALL_NETWORK = "model.backbone=timm:test_resnet"


def detection_recipe(iterations: int = 2, **overrides: object) -> EvaluateRecipe:
    return EvaluateRecipe.model_validate(
        {
            "detector": {
                "backbone": "auto",
                "roi_size": 4,
                "anchor_sizes": [32],
                "rpn_pre_nms": [50, 50],
                "rpn_post_nms": [20, 10],
                "rois_per_image": 8,
            },
            "data": {"train_sizes": [72], "test_size": 72, "max_size": 144},
            "train": {
                "iterations": iterations,
                "batch_size": 2,
                "milestones": [],
                "workers": 0,
                "warmup": 0,
            },
            "test": {"precise_bn_batches": 1, "pictures": 2, "score_threshold": 0.0},
            **overrides,
        }
    )


def frozen_recipe(iterations: int = 2, **overrides: object) -> EvaluateRecipe:
    """A dense head on frozen features, at its smallest."""
    sections: dict[str, object] = {
        "detector": {
            "model": "fcos-fpn",
            "frozen": "res5",
            "new_norm": "none",
            "pyramid_channels": 32,
            "head_convolutions": 1,
            "anchor_sizes": [8, 16, 32],
            "rpn_pre_nms": [50, 50],
        },
        "data": {"train_sizes": [64], "test_size": 64, "max_size": 128, "labels_vary": True},
        "train": {
            "iterations": iterations,
            "batch_size": 2,
            "optimizer": "adamw",
            "schedule": "cosine",
            "milestones": [],
            "workers": 0,
            "warmup": 0,
            "lr": 0.002,
        },
        "test": {"precise_bn_batches": 2, "pictures": 0, "score_threshold": 0.0},
    }
    return EvaluateRecipe.model_validate({**sections, **overrides})


def semantic_recipe(iterations: int = 2, **overrides: object) -> EvaluateRecipe:
    """An FCN at its smallest, on the smallest network."""
    sections: dict[str, object] = {
        "protocol": "semantic",
        "detector": {"model": "fcn", "backbone": "timm:test_resnet", "new_norm": "batch"},
        "semantic": {"channels": 16, "dilation": 2, "short_side": 64, "crop": 64},
        "train": {
            "iterations": iterations,
            "batch_size": 4,
            "milestones": [],
            "workers": 0,
            "warmup": 0,
        },
        "test": {"metric": "miou", "precise_bn_batches": 2, "pictures": 3},
    }
    return EvaluateRecipe.model_validate({**sections, **overrides})


# Overrides with which a detector of any recipe is trained and tested in seconds.
SMALL_DETECTOR = [
    "data.train_sizes=[64]", "data.test_size=64", "data.max_size=128", "train.iterations=2",
    "train.batch_size=2", "train.workers=0", "train.warmup=0", "train.milestones=[]",
    "train.checkpoint_every=1", "test.precise_bn_batches=1", "test.pictures=0",
    "detector.pyramid_channels=32", "detector.rpn_pre_nms=[50, 50]",
]  # fmt: skip
