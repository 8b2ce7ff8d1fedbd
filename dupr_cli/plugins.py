"""Entry points, through which other packages extend a stage.

A package declares, for example, in its pyproject.toml

    [project.entry-points."dupr.methods"]
    my-method = "my_package.method:MyMethod"

and recipes can then use the name. docs/plugins.md describes what each group expects.
"""

from __future__ import annotations

from importlib import metadata

from dupr_cli.errors import UsageError

METHODS = "dupr.methods"
BACKBONES = "dupr.backbones"
SOURCES = "dupr.sources"
EXPORT_FORMATS = "dupr.export_formats"
TRACKERS = "dupr.trackers"

# Plugins that ship with dupr: they need no installed metadata, and no package can replace them.
_BUILT_IN = {
    METHODS: {
        "dupr": "dupr_cli.pretrain.method:Dupr",
        "densecl": "dupr_cli.pretrain.densecl:DenseCl",
    },
    BACKBONES: {
        "timm": "dupr_cli.models.timm:TimmBackbone",
        "transformers": "dupr_cli.models.transformers:TransformersBackbone",
    },
    SOURCES: {
        "folder": "dupr_cli.prepare.sources.folder:FolderSource",
        "classes": "dupr_cli.prepare.sources.folder:ClassFolderSource",
        "archive": "dupr_cli.prepare.sources.archive:ArchiveSource",
        "shards": "dupr_cli.prepare.sources.shards:ShardSource",
        "voc": "dupr_cli.prepare.sources.voc:VocSource",
        "coco": "dupr_cli.prepare.sources.coco:CocoSource",
        "yolo": "dupr_cli.prepare.sources.yolo:YoloSource",
        "masks": "dupr_cli.prepare.sources.masks:MaskFolderSource",
        "list": "dupr_cli.prepare.sources.address_list:ListSource",
        "hf": "dupr_cli.prepare.sources.hugging_face:HuggingFaceSource",
    },
    EXPORT_FORMATS: {
        "torchvision": "dupr_cli.export.formats.torchvision_format:TorchvisionFormat",
        "timm": "dupr_cli.export.formats.timm_format:TimmFormat",
        "transformers": "dupr_cli.export.formats.transformers_format:TransformersFormat",
        "detectron2": "dupr_cli.export.formats.detectron2_format:Detectron2Format",
        "mmdetection": "dupr_cli.export.formats.mmdetection_format:MMDetectionFormat",
        "safetensors": "dupr_cli.export.formats.safetensors_format:SafetensorsFormat",
        "d-fine": "dupr_cli.export.formats.detr_formats:DFineFormat",
        "rt-detr": "dupr_cli.export.formats.detr_formats:RtDetrFormat",
        "onnx": "dupr_cli.export.formats.onnx_format:OnnxFormat",
    },
    TRACKERS: {
        "trackio": "dupr_cli.pretrain.trackers:Trackio",
        "wandb": "dupr_cli.pretrain.trackers:WeightsAndBiases",
        "mlflow": "dupr_cli.pretrain.trackers:MLflow",
    },
}


def plugin_names(group: str) -> list[str]:
    """The names that a recipe may use, without importing any plugin."""
    return sorted(
        {*_BUILT_IN[group], *(point.name for point in metadata.entry_points(group=group))}
    )


def is_plugin(group: str, name: str) -> bool:
    """Whether a recipe may use this name; other packages are searched only if dupr lacks it."""
    return name in _BUILT_IN[group] or name in plugin_names(group)


def _entry_point(group: str, name: str) -> metadata.EntryPoint:
    if name in _BUILT_IN[group]:
        return metadata.EntryPoint(name, _BUILT_IN[group][name], group)
    point, *_ = metadata.entry_points(group=group, name=name)
    return point


def load_plugin(group: str, name: str) -> object:
    """The object with this name. Raises UsageError when its package cannot be imported."""
    point = _entry_point(group, name)
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"{name} ({group}, from {point.value}) cannot be loaded: {error}. Install or repair "
            f"the package that provides it."
        ) from error
