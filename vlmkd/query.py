"""A teacher behind an interface: what it is asked, and the two ways in which a call can fail."""

from __future__ import annotations

from typing import Protocol


class BlackBox(Protocol):
    """A teacher that gives vectors and nothing else; each image and each text is one query that may cost money."""

    def embed_images(self, images: list[bytes]) -> list[list[float]]:
        """A vector for each encoded image, in order.

        Raises:
            NotServed, AnswerLost: no answer.
            UserError: no call of this kind can succeed (wrong address, no permission).
        """
        ...

    def embed_texts(self, texts: list[str]) -> list[list[float]]:
        """A vector for each text, in order; raises as `embed_images` does."""
        ...


class NotServed(Exception):
    """The teacher did not serve the call and charges nothing for it.

    `refused`: it will not serve this content, so that asking again is of no use; else it was busy or out of reach.
    """

    def __init__(self, detail: str, *, refused: bool = False) -> None:
        super().__init__(detail)
        self.refused = refused


class AnswerLost(Exception):
    """The call was sent and no usable answer came back: the teacher may have charged for it."""
