"""What a vision tower expects of its input pixels."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """Input size and pixel statistics of an image tower, as its weights were trained."""

    size: tuple[int, int]
    """Height and width in pixels."""
    mean: tuple[float, float, float]
    """Mean per channel, of pixels in [0, 1]."""
    std: tuple[float, float, float]
    """Standard deviation per channel, of pixels in [0, 1]."""
    interpolation: str = "bicubic"
    """`bicubic` or `bilinear`."""
    resize_mode: str = "shortest"
    """Evaluation resize: `shortest` (shorter side, then centre crop), `squash` or `longest` (pad)."""
    fill: tuple[int, int, int] = (0, 0, 0)
    """Colour (0-255) under transparent pixels and in the padding."""
