"""What an image tower expects of its input."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """As the weights were trained."""

    size: tuple[int, int]
    """Height and width in pixels."""
    mean: tuple[float, float, float]
    """Per channel, of pixels in [0, 1]; `std` likewise."""
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    """`bicubic` or `bilinear`."""
    resize_mode: str = "shortest"
    """For evaluation: `shortest` (shorter side, then centre crop), `squash` or `longest` (pad)."""
    fill: tuple[int, int, int] = (0, 0, 0)
    """Colour (0-255) under transparent pixels and in the padding."""
