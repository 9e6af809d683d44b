"""Models: load any CLIP (clip.py), its frozen form (teacher.py), weights files (checkpoints.py), other formats (convert.py)."""
