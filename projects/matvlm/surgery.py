"""From a decoder with attention to a hybrid with Mamba-2: docs/papers/matvlm.md#from-attention-to-mamba-2.

The decoder stays transformers' own class (Phi, Llama, Qwen2, and what has their layers); the mixer takes the place of
`self_attn` in the chosen layers, and the config's `layer_types` say which, so that `generate` makes the right cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate, find_packed_sequence_indices

from projects.matvlm.mixer import Mamba2Mixer, MixerShape
from vlmkd.errors import UserError
from vlmkd.models.lora import merge_lora

if TYPE_CHECKING:
    from projects.matvlm.config import HybridConfig

PRESETS: dict[float, tuple[int, int]] = {12.5: (6, 8), 25: (4, 4), 50: (2, 2)}
"""Every how many layers, from layer 0 on, and one of how many at most: 12.5 % of 32 are 0, 6, 12 and 18."""
OTHER_ATTENTION = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")
"""What an attention may have that no part of a mixer could start from."""


def chosen_layers(options: HybridConfig, num_layers: int) -> tuple[int, ...]:
    """The layers that become Mamba-2, in order."""
    if bool(options.preset) == bool(options.layers) or options.preset not in (0, *PRESETS):
        raise UserError("give either preset (12.5, 25 or 50) or layers")
    if options.preset:
        every, share = PRESETS[options.preset]
        layers: Sequence[int] = range(0, num_layers, every)[: max(1, round(num_layers / share))]
    else:
        layers = options.layers
    if outside := [layer for layer in layers if not 0 <= layer < num_layers]:
        raise UserError(f"layers {outside} are not among the decoder's, 0 to {num_layers - 1}")
    if len(set(layers)) < len(layers):
        raise UserError(f"layers {list(layers)} name a layer twice")
    if len(layers) == num_layers:
        raise UserError(
            f"all {num_layers} layers are to become Mamba-2; one has to stay attention, which counts the cache's length"
        )
    return tuple(sorted(layers))


def to_hybrid(
    model: PreTrainedModel, options: HybridConfig, generator: torch.Generator | None = None
) -> PreTrainedModel:
    """Replace attention by mixers in `model`, a causal LM or its decoder, in place; the model is returned.

    The random parts come from `generator` (none: seed 0). Without weights (meta device, or to be filled from a file)
    nothing is drawn or copied. All other parameters stay the objects that they are.
    """
    decoder = model.get_decoder()
    layers = chosen_layers(options, len(decoder.layers))
    config = decoder.config
    types = getattr(config, "layer_types", None) or ["full_attention"] * len(decoder.layers)
    if "sliding_attention" in types and not hasattr(decoder, "has_sliding_layers"):
        raise UserError(
            f"{type(decoder).__name__} has sliding attention in a form of its own (Gemma 2 and later), which has no place for "
            "Mamba-2 layers; Phi, Llama, Mistral and Qwen2 have"
        )
    mixers = {}
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    for index in layers:
        attention = getattr(decoder.layers[index], "self_attn", None)
        if isinstance(attention, Mamba2Mixer):  # 25 % after 12.5 %: those stay, with what they learned
            attention.chunk, attention.backend = options.chunk, options.backend
            continue
        if attention is not None:
            merge_lora(attention)
        mixers[index] = mixer_from_attention(attention, index, options, generator)
    for index, mixer in mixers.items():
        decoder.layers[index].self_attn = mixer.train(decoder.training)
    mamba = [isinstance(layer.self_attn, Mamba2Mixer) for layer in decoder.layers]
    config.layer_types = ["linear_attention" if one else kind for one, kind in zip(mamba, types, strict=True)]
    config.matvlm = {**vars(options), "preset": 0.0, "layers": [i for i, one in enumerate(mamba) if one]}
    model._is_stateful = True  # generate then refuses what would take tokens back
    if not any(hook is pass_masks for hook in decoder._forward_pre_hooks.values()):
        decoder.register_forward_pre_hook(pass_masks, with_kwargs=True)
    return model


def mixer_from_attention(
    attention: nn.Module | None, index: int, options: HybridConfig, generator: torch.Generator
) -> Mamba2Mixer:
    """The mixer of the attention's shape, type and device, with its projections: x, B, C are V, K, Q, and O goes out."""
    names = ("v_proj", "k_proj", "q_proj", "dense" if hasattr(attention, "dense") else "o_proj")
    projections = [getattr(attention, name, None) for name in names]
    found = [layer for layer in projections if isinstance(layer, nn.Linear)]
    if attention is None or len(found) < 4:
        raise UserError(
            f"layer {index} has no attention with q, k, v and o projections: {type(attention).__name__}"
        )
    if extra := [name for name in OTHER_ATTENTION if hasattr(attention, name)]:
        raise UserError(
            f"layer {index}: the attention has {', '.join(extra)}, which a mixer has no place for"
        )
    V, K, Q, O = found  # noqa: E741
    size = int(attention.head_dim)
    shape = MixerShape(
        width=Q.in_features, heads=Q.out_features // size, kv_heads=K.out_features // size, head_dim=size,
        bias=options.bias == "auto" and any(layer.bias is not None for layer in found),
    )  # fmt: skip
    factory = {"device": Q.weight.device, "dtype": Q.weight.dtype}
    mixer = Mamba2Mixer(shape, index, options.chunk, options.backend, **factory)
    if Q.weight.is_meta:
        return mixer
    mixer.start(generator)
    with torch.no_grad():
        mixer.norm.weight.fill_(options.norm_start)
        if options.conv_start == "identity":
            mixer.conv1d.weight.copy_(torch.eye(shape.taps)[-1])
            mixer.conv1d.bias.zero_()
        if options.start == "attention":
            scale = getattr(attention, "scaling", size**-0.5) if options.fold_scale else 1.0
            for name in ("weight", "bias")[: 1 + shape.bias]:
                rows = getattr(mixer.in_proj, name).split(shape.rows)[1:4]
                for row, layer, factor in zip(rows, (V, K, Q), (1.0, 1.0, scale), strict=True):
                    row.copy_(_or_zeros(layer, name) * factor)
                getattr(mixer.out_proj, name).copy_(_or_zeros(O, name))
    return mixer


def _or_zeros(layer: nn.Linear, name: str) -> Tensor:
    """Weight or bias; Qwen2's output projection has no bias where the others do."""
    found = getattr(layer, name)
    return layer.weight.new_zeros(layer.out_features) if found is None else found


def mixers_of(model: nn.Module) -> dict[str, Mamba2Mixer]:
    """The Mamba-2 mixers by their names: what is trained, found by module."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Mamba2Mixer)}


def pass_masks(
    decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]]:
    """Before a decoder's forward: what its Mamba-2 layers need beside attention's mask.

    The 2-D mask goes to them as `token_mask`, and documents packed in rows, which transformers tells by positions that
    start again, as `seq_idx`; either may also be given. What `generate` prepared for compiled decoding is unpacked.
    """
    names = ("input_ids", "attention_mask", "position_ids", "cache", "inputs_embeds", "use_cache")
    given: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
    mask, cache = given.get("attention_mask"), given.get("cache", given.get("past_key_values"))
    tokens = given["input_ids"] if given.get("inputs_embeds") is None else given["inputs_embeds"]
    batch, length = tokens.shape[:2]
    use_cache = given.get("use_cache")
    positions = given.get("position_ids")
    if cache is not None or (decoder.config.use_cache if use_cache is None else use_cache):
        positions = None  # transformers knows packed rows by their positions without a cache only
    by_type = hasattr(decoder, "has_sliding_layers")  # Qwen2 looks each layer's mask up by its type
    if isinstance(mask, dict):
        token_mask = mask.get("linear_attention")
        given["attention_mask"] = mask if by_type else mask["full_attention"]
    else:
        token_mask = mask[:, -length:] if isinstance(mask, Tensor) and mask.ndim == 2 else None
        if by_type:
            like = decoder.get_input_embeddings().weight.new_empty((batch, length, 0))
            given["attention_mask"] = create_masks_for_generate(decoder.config, like, mask, cache, positions)
    if token_mask is not None and given.get("token_mask") is None:
        if torch.compiler.is_compiling() or not bool(token_mask.all()):
            given["token_mask"] = token_mask
    whole = mask is None or (isinstance(mask, Tensor) and mask.ndim == 4)  # which has no padding, or hides it
    if positions is not None and whole and given.get("seq_idx") is None:
        documents = find_packed_sequence_indices(positions.expand(batch, -1))
        if documents is not None:
            given["seq_idx"] = documents
    return (), given
