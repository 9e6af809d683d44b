"""What a Mamba-2 layer keeps between calls, in the caches of transformers.

A hybrid's cache is any `transformers.Cache`: `DynamicCache(config=model.config)`, what `generate` makes of the
config's `layer_types`, or a plain `DynamicCache()`. Its length and the attention masks come from its first attention
layer, never from a layer like this one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer


class MambaLayer(LinearAttentionLayer):
    """The last inputs of the convolution [b, w - 1, channels] and the state [b, h, p, n] in float32, at fixed addresses."""

    is_croppable = False

    def read(self) -> tuple[Tensor, Tensor] | None:
        """Window and state, the tensors themselves; none before the first `write` and after `reset`."""
        if not self.has_previous_state[0]:
            return None
        return self.conv_states[0], self.recurrent_states[0]

    def write(self, window: Tensor, state: Tensor) -> None:
        """Copy both in, without their gradients."""
        if not self.is_conv_states_initialized[0]:
            self.lazy_initialization(window, state)
        self.conv_states[0].copy_(window.detach())
        self.recurrent_states[0].copy_(state.detach())
        self.has_previous_state[0] = True

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_conv_states_initialized[0]:
            rows = torch.arange(len(self.conv_states[0]), device=self.device)
            self.reorder_cache(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """A state cannot forget its last tokens: decode with a copy of the cache where they may have to go."""
        if tokens_to_remove:
            raise NotImplementedError("a Mamba-2 state cannot be cropped; keep a copy of the cache")


def mamba_layer(cache: Cache, layer_idx: int) -> MambaLayer:
    """The cache's entry of a Mamba-2 layer, put in place of an unused one that the cache was made with."""
    while len(cache.layers) <= layer_idx:
        cache.layers.append(DynamicLayer())
    layer = cache.layers[layer_idx]
    if not isinstance(layer, MambaLayer):
        cache.layers[layer_idx] = layer = MambaLayer()
    return layer
