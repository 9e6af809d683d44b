"""vlmkd: distilling vision-language models, one core for seven papers."""

__version__ = "0.1.0"
