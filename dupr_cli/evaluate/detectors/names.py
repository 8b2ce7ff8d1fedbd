"""detectron2's names for the C4 detectors' tensors, used to show that the networks are the same."""

from __future__ import annotations

from dupr_cli.evaluate.detectors import Detector
from dupr_cli.models.naming import detectron2_backbone_name

_PLAIN = {
    "rpn.head.conv.0.0.": "proposal_generator.rpn_head.conv.",
    "rpn.head.cls_logits.": "proposal_generator.rpn_head.objectness_logits.",
    "rpn.head.bbox_pred.": "proposal_generator.rpn_head.anchor_deltas.",
    "roi_heads.head.norm.": "roi_heads.res5.norm.",
    "roi_heads.head.mask_head.": "roi_heads.mask_head.",
}


def detectron2_names(detector: Detector) -> dict[str, str]:
    """dupr's name to detectron2's, for every parameter and buffer of a C4 detector, each once.

    Source: detectron2, modeling/ (rpn.py, roi_heads.py with Res5ROIHeads, mask_head.py), and the
    extra norm of MoCo's detection/train_net.py.
    """
    state = detector.state_dict().keys()
    own = [name for name, _ in (*detector.named_parameters(), *detector.named_buffers())]
    return {name: _name(name.removeprefix("network.")) for name in own if name in state}


def _name(name: str) -> str:
    if name.startswith("backbone."):
        theirs = detectron2_backbone_name(name.removeprefix("backbone."))
        return f"roi_heads.{theirs}" if theirs.startswith("res5.") else f"backbone.{theirs}"
    for prefix, theirs in _PLAIN.items():
        if name.startswith(prefix):
            return theirs + name.removeprefix(prefix)
    return name
