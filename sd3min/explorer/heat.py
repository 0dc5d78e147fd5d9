"""Heat maps over pictures: a word's share of each patch's attention, as colours."""

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from sd3min.explorer.studio import Drawing

LEAST_SIDE = 512  # pixels of the longer side of a map
RAMP = np.array(  # from what did not look to what looked most
    [(24, 20, 44), (92, 24, 84), (178, 42, 72), (236, 104, 44), (255, 180, 70), (255, 244, 190)],
    dtype=np.float32,
)
GREY = 0.36  # brightness of the picture below


def heat(
    drawing: Drawing, word: int, layer: int | None = None, step: int | None = None
) -> Float[Tensor, "row column"]:
    """How much each cell of the picture read a word, by its number in the prompt.

    The mean over all layers and steps where none is named; a step beyond the last is the last.
    """
    maps = drawing.heat[:, :, word].float()
    maps = maps if step is None else maps[min(step, len(maps) - 1)][None]
    maps = maps if layer is None else maps[:, layer][:, None]
    return maps.mean(dim=(0, 1))


def colours(warmth: np.ndarray) -> np.ndarray:
    """Colours [h, w, 3] of warmth [h, w] between 0 and 1, along the ramp."""
    places = np.linspace(0, 1, len(RAMP))
    return np.stack([np.interp(warmth, places, RAMP[:, i]) for i in range(3)], axis=-1)


def over(picture: Image.Image, values: Float[Tensor, "row column"]) -> Image.Image:
    """A map over a picture in dark grey; the coldest cell is the ramp's begin, the warmest its end.

    A small picture is enlarged by a whole number, so that the map may be smooth.
    """
    factor = max(1, LEAST_SIDE // max(picture.size))
    size = (picture.width * factor, picture.height * factor)
    grey = np.asarray(picture.convert("L").resize(size, Image.Resampling.NEAREST)) * GREY
    span = (values.max() - values.min()).clamp(min=1e-9)
    small = Image.fromarray(((values - values.min()) / span).numpy())
    warmth = np.asarray(small.resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    share = (0.3 + 0.62 * warmth)[..., None]
    mixed = grey[..., None] * (1 - share) + colours(warmth) * share
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))
