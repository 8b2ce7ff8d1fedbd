"""Text of pictures, cut to the width that is there for it."""

from __future__ import annotations

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def shortened(text: str, font: Font, width: int) -> str:
    """Shorten text wider than `width` at its beginning, because keys differ at their ends."""
    if font.getlength(text) <= width:
        return text
    kept = next(i for i in range(len(text)) if font.getlength("..." + text[i:]) <= width)
    return "..." + text[kept:]


def shortened_end(text: str, font: Font, width: int) -> str:
    """Shorten text wider than `width` at its end, for sentences."""
    if font.getlength(text) <= width:
        return text
    kept = next(i for i in range(len(text), -1, -1) if font.getlength(text[:i] + "...") <= width)
    return text[:kept] + "..."
