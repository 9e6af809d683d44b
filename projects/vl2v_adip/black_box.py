"""A paid teacher: any embedding service over HTTP.

The protocol is one call by the rules of vlmkd/service.py:

    {"kind": "image", "inputs": ["<base64 of an image file>", ...]}    or    {"kind": "text", "inputs": ["a dog", ...]}
    200 {"vectors": [[0.1, -0.3, ...], ...]}    one list of numbers per input, in the same order
"""

from __future__ import annotations

import base64
import json
from typing import Any, Literal

from vlmkd.service import AnswerLost, HttpService

Kind = Literal["image", "text"]

_LARGEST_ANSWER = 1 << 20  # bytes for one input: some 50,000 numbers


class HttpTeacher(HttpService):
    """A service that speaks the module's protocol."""

    def embed(self, kind: Kind, inputs: list[Any]) -> list[list[float]]:
        """A vector for each encoded image (bytes) or text, in order.

        Raises:
            NotServed, AnswerLost: no answer.
            UserError: no call can succeed.
        """
        sent = [base64.b64encode(part).decode("ascii") for part in inputs] if kind == "image" else inputs
        answer = self.post({"kind": kind, "inputs": sent}, _LARGEST_ANSWER * len(inputs))
        try:
            vectors = json.loads(answer)["vectors"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise AnswerLost(f"the answer has no vectors ({type(error).__name__})") from None
        if isinstance(vectors, list) and len(vectors) == len(inputs):
            return vectors
        raise AnswerLost(f"the answer does not have one vector for each of {len(inputs)} inputs")
