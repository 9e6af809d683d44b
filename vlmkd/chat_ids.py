"""Numbers that data and models of conversations agree on."""

IMAGE_ID = -200
"""Token id in the place of each feature of an image."""
IGNORED = -100
"""Target of a position that is not learned."""
