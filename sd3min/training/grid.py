"""Pictures side by side."""

import math
from collections.abc import Sequence

from PIL import Image


def grid(pictures: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Pictures of one size in rows, as nearly square as they go unless `columns` says otherwise."""
    across = columns or math.ceil(math.sqrt(len(pictures)))
    width, height = pictures[0].size
    whole = Image.new("RGB", (width * across, height * math.ceil(len(pictures) / across)), "white")
    for i, picture in enumerate(pictures):
        whole.paste(picture, (i % across * width, i // across * height))
    return whole
