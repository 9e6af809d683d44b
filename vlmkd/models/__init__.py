"""Models: load any CLIP (clip.py), run it (towers.py), weights files (checkpoints.py), transformers' layout (convert.py)."""
