"""What tests of resumable state share."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch


def restored(make: Callable[[], Any], state: dict[str, Any]) -> Any:
    """A new object with `state` after a round trip through a checkpoint file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    fresh = make()
    fresh.load_state(torch.load(file, weights_only=True))
    return fresh
