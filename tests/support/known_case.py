"""A case of detection whose average precision others have published: 7 images, one class.

Source: sample 2 of github.com/rafaelpadilla/Object-Detection-Metrics (MIT licence), its boxes and
the figures of its own code. Boxes are x, y, width, height; the last pixel is x + width, and it
belongs to the box, as in the VOC development kit.
"""

from __future__ import annotations

Box = tuple[int, int, int, int]

TRUTHS: dict[str, list[Box]] = {
    "00001": [
        (25, 16, 38, 56), (129, 123, 41, 62),
    ],
    "00002": [
        (123, 11, 43, 55), (38, 132, 59, 45),
    ],
    "00003": [
        (16, 14, 35, 48), (123, 30, 49, 44), (99, 139, 47, 47),
    ],
    "00004": [
        (53, 42, 40, 52), (154, 43, 31, 34),
    ],
    "00005": [
        (59, 31, 44, 51), (48, 128, 34, 52),
    ],
    "00006": [
        (36, 89, 52, 76), (62, 58, 44, 67),
    ],
    "00007": [
        (28, 31, 55, 63), (58, 67, 50, 58),
    ],
}  # fmt: skip

# With the score before the box.
DETECTIONS: dict[str, list[tuple[float, int, int, int, int]]] = {
    "00001": [
        (0.88, 5, 67, 31, 48), (0.7, 119, 111, 40, 67), (0.8, 124, 9, 49, 67),
    ],
    "00002": [
        (0.71, 64, 111, 64, 58), (0.54, 26, 140, 60, 47), (0.74, 19, 18, 43, 35),
    ],
    "00003": [
        (0.18, 109, 15, 77, 39), (0.67, 86, 63, 46, 45), (0.38, 160, 62, 36, 53),
        (0.91, 105, 131, 47, 47), (0.44, 18, 148, 40, 44),
    ],
    "00004": [
        (0.35, 83, 28, 28, 26), (0.78, 28, 68, 42, 67), (0.45, 87, 89, 25, 39),
        (0.14, 10, 155, 60, 26),
    ],
    "00005": [
        (0.62, 50, 38, 28, 46), (0.44, 95, 11, 53, 28), (0.95, 29, 131, 72, 29),
        (0.23, 29, 163, 72, 29),
    ],
    "00006": [
        (0.45, 43, 48, 74, 38), (0.84, 17, 155, 29, 35), (0.43, 95, 110, 25, 42),
    ],
    "00007": [
        (0.48, 16, 20, 101, 88), (0.95, 33, 116, 37, 49),
    ],
}  # fmt: skip

# Average precision by IoU, at 11 points and as the area under the curve.
STATED_VOC07 = {0.1: 0.3333333333, 0.3: 0.2683982683, 0.5: 0.0303030303, 0.75: 0.0}
STATED_VOC10 = {0.1: 0.3371980676, 0.3: 0.2456866804, 0.5: 0.0222222222, 0.75: 0.0}
