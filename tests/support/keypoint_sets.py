"""Sets with keypoints: faces of three dots on a square, as COCO and as YOLO write them."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageDraw

SIZE = 96, 80
# Nose, left, right: left and right change in a mirrored image.
FLIPS = [0, 2, 1]


def _draw(path: Path, left: int, top: int) -> list[float]:
    """A face: three dots on a square; returns its keypoints."""
    image = Image.new("RGB", SIZE, (40, 60, 80))
    draw = ImageDraw.Draw(image)
    draw.rectangle((left, top, left + 39, top + 39), fill=(200, 180, 160))
    points = [(left + 20, top + 20), (left + 8, top + 10), (left + 31, top + 10)]
    for (x, y), colour in zip(points, ((255, 0, 0), (0, 255, 0), (0, 0, 255)), strict=True):
        draw.rectangle((x - 2, y - 2, x + 2, y + 2), fill=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return [value for x, y in points for value in (x, y, 2)]


def coco_faces(root: Path, counts: dict[str, int]) -> Path:
    """COCO's layout: instances with faces and trees, and their keypoints in a separate file."""
    (root / "annotations").mkdir(parents=True)
    for split, count in counts.items():
        images, objects, faces = [], [], []
        for number in range(count):
            left, top = 3 + 9 * (number % 5), 2 + 7 * (number % 4)
            name = f"{number:03d}.png"
            points = _draw(root / split / name, left, top)
            images.append({"id": number, "file_name": name, "width": SIZE[0], "height": SIZE[1]})
            face = {
                "id": 2 * number + 1, "image_id": number, "category_id": 1, "iscrowd": 0,
                "bbox": [left, top, 40, 40], "area": 1600,
            }  # fmt: skip
            objects += [face, {**face, "id": 2 * number + 2, "category_id": 2}]
            faces.append({**face, "keypoints": points, "num_keypoints": 3})
        classes = [{"id": 1, "name": "face"}, {"id": 2, "name": "tree"}]
        for kind, rows in (("instances", objects), ("person_keypoints", faces)):
            content = {"images": images, "categories": classes, "annotations": rows}
            (root / "annotations" / f"{kind}_{split}.json").write_text(json.dumps(content))
    return root


def yolo_faces(file: Path) -> Path:
    """The data.yaml of a pose set, in a folder of its own."""
    root = file.parent
    for split, count in (("train", 4), ("val", 2)):
        for number in range(count):
            points = _draw(root / "images" / split / f"{number}.png", 5 + 9 * number, 4)
            left = 5 + 9 * number
            shares = [(left + 20) / SIZE[0], 24 / SIZE[1], 40 / SIZE[0], 40 / SIZE[1]]
            placed = [v / (*SIZE, 1)[i % 3] for i, v in enumerate(points)]
            labels = root / "labels" / split / f"{number}.txt"
            labels.parent.mkdir(parents=True, exist_ok=True)
            labels.write_text(" ".join(map(str, (0, *shares, *placed))) + "\n")
    file.write_text(
        "path: .\ntrain: images/train\nval: images/val\nnames: {0: face}\n"
        f"kpt_shape: [3, 3]\nflip_idx: {FLIPS}\n"
    )
    return file
