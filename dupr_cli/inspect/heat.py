"""Heat maps over pictures: similarity from low (dark blue) to high (yellow).

The colours are those of viridis, which people with any colour vision can order by brightness.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_OPACITY = 0.6  # of the colours over the picture


def heat_panel(
    picture: Image.Image, values: NDArray[np.float32], limits: tuple[float, float]
) -> Image.Image:
    """The picture in grey under the colours of `values`.

    values: (h, w), of cells that divide the whole picture. limits: values of the darkest and the
    brightest colour.
    """
    from matplotlib import colormaps

    low, high = limits
    shares = (values - low) / ((high - low) or 1.0)
    smooth = Image.fromarray(shares.astype(np.float32)).resize(
        picture.size, Image.Resampling.BILINEAR
    )
    colours = colormaps["viridis"](np.asarray(smooth).clip(0, 1))[..., :3]
    layer = Image.fromarray((255 * colours).astype(np.uint8))
    return Image.blend(picture.convert("L").convert("RGB"), layer, _OPACITY)
