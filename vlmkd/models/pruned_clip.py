"""CLIP with ragged layers: every layer has its own number of heads and FFN channels, every tower its own width.

What automatic TinyCLIP inheritance leaves after fusing, and what the published `auto` checkpoints hold. A layer may
have lost all heads or its whole FFN; the bias that its output projection added stays. The head width does not shrink,
so heads * head_width differs from the width of the tower.

Letters: B batch, T tokens, D width of the tower, H heads of the layer, F FFN channels of the layer, E embedding.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmkd.errors import UserError

Config = dict[str, Any]
State = dict[str, Tensor]

_TEXT_NAMES = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
_WRAPPERS = ("_image_encoder.", "_text_encoder.", "_logit_scale.")
_DUPLICATES = ("image_encoder_without_ddp.", "text_encoder_without_ddp.", "logit_scale_without_ddp.")


class OutputBias(nn.Module):
    """What is left of an output projection without inputs: its bias [D], broadcast over tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self) -> Tensor:
        """The bias as [1, 1, D]; a copy, because ZeRO 3 frees the parameter's memory after this call."""
        return self.bias.view(1, 1, -1).clone()


class PrunedAttention(nn.Module):
    """Self-attention with `heads` heads of `head_width` channels inside a width-D stream."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, head_width
        inner = heads * head_width
        self.out_proj: nn.Module
        if heads:
            self.in_proj_weight = nn.Parameter(torch.empty(3 * inner, width))
            self.in_proj_bias = nn.Parameter(torch.zeros(3 * inner))
            self.out_proj = nn.Linear(inner, width)
            nn.init.normal_(self.in_proj_weight, std=width**-0.5)
        else:
            self.out_proj = OutputBias(width)

    def attend(self, x: Tensor, causal: bool) -> Tensor:
        """Attention output of every head before the output projection, [B, H, T, head_width]."""
        query, key, value = (
            F.linear(x, self.in_proj_weight, self.in_proj_bias)
            .unflatten(-1, (3, self.heads, self.head_width))
            .permute(2, 0, 3, 1, 4)
        )
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """x [B, T, D] -> [B, T, D], or [1, 1, D] without heads."""
        if not self.heads:
            return self.out_proj()
        return self.out_proj(self.attend(x, causal).transpose(1, 2).flatten(2))


class PrunedMLP(nn.Module):
    """Feed-forward layer with `channels` hidden channels."""

    def __init__(self, width: int, channels: int, quick_gelu: bool) -> None:
        super().__init__()
        self.channels, self.quick_gelu = channels, quick_gelu
        self.c_proj: nn.Module
        if channels:
            self.c_fc = nn.Linear(width, channels)
            self.c_proj = nn.Linear(channels, width)
        else:
            self.c_proj = OutputBias(width)

    def activate(self, x: Tensor) -> Tensor:
        """Hidden channels after the activation, [B, T, F]."""
        hidden = self.c_fc(x)
        return hidden * torch.sigmoid(1.702 * hidden) if self.quick_gelu else F.gelu(hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D], or [1, 1, D] without channels."""
        return self.c_proj(self.activate(x)) if self.channels else self.c_proj()


class PrunedBlock(nn.Module):
    """Pre-norm transformer block; a part without units keeps no LayerNorm."""

    def __init__(self, width: int, heads: int, channels: int, head_width: int, quick_gelu: bool) -> None:
        super().__init__()
        if heads:
            self.ln_1 = nn.LayerNorm(width)
        self.attn = PrunedAttention(width, heads, head_width)
        if channels:
            self.ln_2 = nn.LayerNorm(width)
        self.mlp = PrunedMLP(width, channels, quick_gelu)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        x = x + self.attn(self.ln_1(x) if self.attn.heads else x, causal)
        return x + self.mlp(self.ln_2(x) if self.mlp.channels else x)


class PrunedTransformer(nn.Module):
    """A stack of PrunedBlocks."""

    def __init__(self, tower: Config, quick_gelu: bool) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.resblocks = nn.ModuleList(
            PrunedBlock(tower["width"], heads, channels, tower["head_width"], quick_gelu)
            for heads, channels in zip(tower["heads"], tower["mlp"], strict=True)
        )

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        for block in self.resblocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, causal, use_reentrant=False)
            else:
                x = block(x, causal)
        return x


class PrunedImageTower(nn.Module):
    """Vision transformer with a class token: images [B, 3, h, w] -> [B, E]."""

    def __init__(self, tower: Config, embed_dim: int, quick_gelu: bool) -> None:
        super().__init__()
        width, patch = tower["width"], tower["patch_size"]
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(_num_patches(tower) + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = PrunedTransformer(tower, quick_gelu)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))

    def embed(self, images: Tensor) -> Tensor:
        """Patch and class tokens with their positions, [B, T, D]."""
        patches = self.conv1(images.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        first = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        return torch.cat([first, patches], dim=1) + self.positional_embedding.to(patches.dtype)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, h, w] -> [B, E], not normalised."""
        x = self.transformer(self.ln_pre(self.embed(images)), causal=False)
        return self.ln_post(x[:, 0]) @ self.proj


class PrunedTextTower(nn.Module):
    """Causal text transformer pooled at the highest token id (end of text): tokens [B, T] -> [B, E]."""

    def __init__(self, tower: Config, embed_dim: int, quick_gelu: bool) -> None:
        super().__init__()
        width = tower["width"]
        self.token_embedding = nn.Embedding(tower["vocab_size"], width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(tower["context_length"], width))
        self.transformer = PrunedTransformer(tower, quick_gelu)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token vectors with their positions, [B, T, D]."""
        return self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]

    @staticmethod
    def pool(x: Tensor, tokens: Tensor) -> Tensor:
        """The end-of-text position of x [B, T, D] -> [B, D]."""
        return x[torch.arange(len(x), device=x.device), tokens.argmax(dim=-1)]

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] -> [B, E], not normalised."""
        x = self.transformer(self.embed(tokens), causal=True)
        return self.ln_final(self.pool(x, tokens)) @ self.text_projection


class PrunedCLIP(nn.Module):
    """A CLIP built from a pruned config (see `check_config`), with open_clip's encode interface.

    The state dict has `visual.*`, `text.*` and `logit_scale`; inside the towers the names are open_clip's. The text
    tower is a module of its own, so that sharded parameters (ZeRO 3) are gathered around its forward pass.
    """

    visual: nn.Module
    text: nn.Module

    def __init__(self, config: Config) -> None:
        super().__init__()
        check_config(config)
        self.config = config
        quick_gelu = config["activation"] == "quick_gelu"
        self.visual = PrunedImageTower(config["vision_cfg"], config["embed_dim"], quick_gelu)
        self.text = PrunedTextTower(config["text_cfg"], config["embed_dim"], quick_gelu)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if config.get("logit_bias") else None

    @classmethod
    def from_config(cls, config: Config) -> PrunedCLIP:
        """A randomly initialised model."""
        return cls(config)

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """images [B, 3, h, w] -> [B, E]."""
        features = self.visual(images)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """tokens [B, T] -> [B, E]."""
        features = self.text(tokens)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """Unit embeddings [B, E] of both and exp(logit_scale) (then logit_bias, where there is one), as open_clip."""
        outputs = (
            self.encode_image(images, normalize=True),
            self.encode_text(tokens, normalize=True),
            self.logit_scale.exp(),
        )
        return outputs if self.logit_bias is None else (*outputs, self.logit_bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks of both towers in the backward pass."""
        for part in self.modules():
            if isinstance(part, PrunedTransformer):
                part.grad_checkpointing = enable

    def load_upstream_state(self, state: Mapping[str, Tensor]) -> None:
        """Load weights under any name layout of `tower_names`, strictly.

        Blocks that the file lacks add nothing: their output bias is set to zero. Half precision is converted.

        Raises:
            UserError: a tensor is missing, left over, or of another shape.
        """
        given = tower_names(state)
        wanted = self.state_dict()
        filled: State = {}
        for name, tensor in wanted.items():
            if name in given:
                filled[name] = given.pop(name)
                if filled[name].shape != tensor.shape:
                    raise UserError(
                        f"weights: {name} is {list(filled[name].shape)}, but the config asks for {list(tensor.shape)}; "
                        "use the config that belongs to these weights (config_from_state_dict reads it)"
                    )
            elif (
                name.endswith(("out_proj.bias", "c_proj.bias"))
                and name.replace("bias", "weight") not in wanted
            ):
                filled[name] = torch.zeros_like(tensor)
            else:
                raise UserError(f"weights: {name} is missing; use the config that belongs to these weights")
        left = [name for name in given if not _is_spent(name, given[name], wanted)]
        if left:
            raise UserError(f"weights: {left[0]} (and {len(left) - 1} more) has no place in this config")
        self.load_state_dict(filled)


def _is_spent(name: str, tensor: Tensor, wanted: Mapping[str, Tensor]) -> bool:
    """Whether `name` belongs to a removed block: no elements, or the LayerNorm before a part that is gone."""
    if not tensor.numel():
        return True
    norm = re.fullmatch(r"(.*resblocks\.\d+\.)ln_([12])\.(weight|bias)", name)
    if norm is None:
        return False
    part = {"1": "attn.in_proj_weight", "2": "mlp.c_fc.weight"}[norm[2]]
    return f"{norm[1]}{part}" not in wanted


def tower_names(state: Mapping[str, Tensor]) -> State:
    """`state` under PrunedCLIP's names.

    Reads open_clip's plain names, PrunedCLIP's own, and those of TinyCLIP's training code: `_image_encoder.`,
    `_text_encoder.`, `_logit_scale.`, each with or without `module.`; the `*_without_ddp.` copies are used only where
    the first are absent.
    """
    result: State = {}
    for name, tensor in sorted(state.items(), key=lambda item: not item[0].startswith(_DUPLICATES)):
        for prefix in (*_WRAPPERS, *_DUPLICATES):
            name = name.removeprefix(prefix)
        name = name.removeprefix("module.")
        if name != "attn_mask":
            result[f"text.{name}" if name.startswith(_TEXT_NAMES) else name] = (
                tensor  # a copy, read first, gives way
            )
    return result


def canonical_names(state: Mapping[str, Tensor]) -> State:
    """PrunedCLIP's names turned into open_clip.CLIP's (the text tower at the top level)."""
    return {name.removeprefix("text."): tensor for name, tensor in state.items()}


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse a pruned config that lacks a field or contradicts itself.

    Layout: embed_dim, pruned (true), activation ("gelu" or "quick_gelu"), optional logit_bias (bool); vision_cfg with
    image_size, patch_size, width, heads (one number a layer), mlp (FFN channels, one number a layer), head_width;
    text_cfg with context_length, vocab_size, width, heads, mlp, head_width. Other fields are left to their owners.

    Raises:
        UserError: names the field.
    """
    shared = ("width", "heads", "mlp", "head_width")
    for field, parts in (
        ("", ("embed_dim", "vision_cfg", "text_cfg", "activation")),
        ("vision_cfg", ("image_size", "patch_size", *shared)),
        ("text_cfg", ("context_length", "vocab_size", *shared)),
    ):
        section = config[field] if field else config
        for part in parts:
            if part not in section:
                raise UserError(f"pruned model config: field {f'{field}.{part}'.lstrip('.')} is missing")
    if config["activation"] not in ("gelu", "quick_gelu"):
        raise UserError(
            f"pruned model config: activation is {config['activation']!r}; choose gelu or quick_gelu"
        )
    for field in ("vision_cfg", "text_cfg"):
        heads, mlp = config[field]["heads"], config[field]["mlp"]
        if (
            not isinstance(heads, (list, tuple))
            or not isinstance(mlp, (list, tuple))
            or len(heads) != len(mlp)
        ):
            raise UserError(
                f"pruned model config: {field}.heads and {field}.mlp must be lists of one length, one number a layer"
            )
        if min([*heads, *mlp], default=0) < 0 or config[field]["width"] < 1:
            raise UserError(f"pruned model config: {field} holds a negative size or no width")


def config_from_state_dict(
    state: Mapping[str, Tensor],
    *,
    head_width: int = 64,
    text_head_width: int | None = None,
    activation: str = "gelu",
) -> Config:
    """The ragged config of `state` (any layout of `tower_names`), read from its shapes.

    Layers are numbered by the file; parts whose keys are absent or empty have 0 heads or channels. The image size
    assumes a square grid. Head width (`text_head_width` where the text tower's differs) and activation are not in a
    file and must be told.

    Raises:
        UserError: the file is no ViT + text transformer CLIP, or its shapes do not fit `head_width`.
    """
    named = tower_names(state)
    for name in (
        "visual.conv1.weight",
        "visual.proj",
        "visual.positional_embedding",
        "text.token_embedding.weight",
    ):
        if name not in named:
            raise UserError(
                f"weights: {name.removeprefix('text.')} is missing, so this is no ViT and text transformer CLIP"
            )
    conv = named["visual.conv1.weight"]
    patches = len(named["visual.positional_embedding"]) - 1
    grid = math.isqrt(patches)
    if conv.ndim != 4 or conv.shape[1] != 3 or grid * grid != patches:
        raise UserError(
            f"weights: visual.conv1.weight {list(conv.shape)} with {patches} patches is no ViT on a square grid"
        )
    config: Config = {
        "embed_dim": named["visual.proj"].shape[1],
        "pruned": True,
        "activation": activation,
        "vision_cfg": {
            "image_size": grid * conv.shape[2],
            "patch_size": conv.shape[2],
            "width": conv.shape[0],
            **_layers_from_state(named, "visual.", head_width),
        },
        "text_cfg": {
            "context_length": len(named["text.positional_embedding"]),
            "vocab_size": named["text.token_embedding.weight"].shape[0],
            "width": named["text.token_embedding.weight"].shape[1],
            **_layers_from_state(named, "text.", text_head_width or head_width),
        },
    }
    if "logit_bias" in named:
        config["logit_bias"] = True
    return config


def _layers_from_state(named: State, tower: str, head_width: int) -> Config:
    """Fields heads, mlp and head_width of one tower."""
    prefix = f"{tower}transformer.resblocks."
    depth = 1 + max(
        (int(name[len(prefix) :].split(".")[0]) for name in named if name.startswith(prefix)), default=-1
    )
    heads, mlp = [], []
    for layer in range(depth):
        in_proj = named.get(f"{prefix}{layer}.attn.in_proj_weight")
        rows = 0 if in_proj is None else len(in_proj)
        if rows % (3 * head_width):
            raise UserError(
                f"weights: {prefix}{layer}.attn.in_proj_weight has {rows} rows, no multiple of 3 x head width {head_width}; "
                "tell the head width of this model"
            )
        heads.append(rows // (3 * head_width))
        c_fc = named.get(f"{prefix}{layer}.mlp.c_fc.weight")
        mlp.append(0 if c_fc is None else len(c_fc))
    return {"heads": heads, "mlp": mlp, "head_width": head_width}


def config_from_clip(model: nn.Module) -> Config:
    """The pruned config of an unpruned open_clip.CLIP (ViT and causal text transformer), or of a PrunedCLIP.

    Raises:
        UserError: the model has parts that PrunedCLIP does not have; names the part.
    """
    if isinstance(model, PrunedCLIP):
        return model.config
    visual: Any = getattr(model, "visual", None)
    stacks: list[Any] = [
        getattr(getattr(part, "transformer", None), "resblocks", ()) for part in (visual, model)
    ]
    if not all(stacks) or not hasattr(visual, "class_embedding"):
        raise UserError(
            "model: pruning needs an open_clip CLIP with a ViT image tower and its own text transformer"
        )
    first = stacks[0][0]
    quick_gelu = type(first.mlp.gelu).__name__ == "QuickGELU"
    norms = [part for part in model.modules() if isinstance(part, nn.LayerNorm)]
    blocks = [block for stack in stacks for block in stack]
    refusals = {
        "attentional pooling": visual.attn_pool is not None,
        "pooling other than the class token": visual.pool_type != "tok" or visual.final_ln_after_pool,
        "no ln_pre": not isinstance(visual.ln_pre, nn.LayerNorm),
        "text pooling other than argmax": model.text_pool_type != "argmax",
        "a text tower without causal mask": model.attn_mask is None,
        "a text projection that is no plain matrix": not isinstance(model.text_projection, Tensor),
        "LayerScale or custom blocks": any(
            type(block).__name__ != "ResidualAttentionBlock" or not isinstance(block.ls_1, nn.Identity)
            for block in blocks
        ),
        "an activation other than GELU and QuickGELU": not quick_gelu
        and getattr(first.mlp.gelu, "approximate", "") != "none",
        "LayerNorms with an epsilon other than 1e-5": any(norm.eps != 1e-5 for norm in norms),
    }
    found = [what for what, present in refusals.items() if present]
    if found:
        raise UserError(f"model: pruning does not support {found[0]}; choose a plain ViT CLIP")
    return config_from_state_dict(
        model.state_dict(),
        head_width=first.attn.head_dim,
        text_head_width=stacks[1][0].attn.head_dim,
        activation="quick_gelu" if quick_gelu else "gelu",
    )


def _num_patches(tower: Mapping[str, Any]) -> int:
    size, patch = tower["image_size"], tower["patch_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return (height // patch) * (width // patch)


def count_parameters(config: Mapping[str, Any]) -> dict[str, int]:
    """Parameters of each tower of a pruned config, and `tokens`, the token table's share of `text`."""
    embed = config["embed_dim"]
    image, text = config["vision_cfg"], config["text_cfg"]
    tokens = text["vocab_size"] * text["width"]
    patch = 3 * image["patch_size"] ** 2
    # Beside the blocks: class token and positions, ln_pre and ln_post (ln_final), and the projection.
    return {
        "image": image["width"] * (patch + 1 + _num_patches(image) + 1 + 4 + embed)
        + _block_parameters(image),
        "text": tokens + text["width"] * (text["context_length"] + 2 + embed) + _block_parameters(text),
        "tokens": tokens,
    }


def _block_parameters(tower: Mapping[str, Any]) -> int:
    width, total = tower["width"], 0
    for heads, channels in zip(tower["heads"], tower["mlp"], strict=True):
        inner = heads * tower["head_width"]
        total += 4 * inner * width + 3 * inner + (2 * width if heads else 0) + width
        total += 2 * channels * width + channels + (2 * width if channels else 0) + width
    return total


def count_macs(config: Mapping[str, Any]) -> dict[str, int]:
    """Multiply-accumulates of one image and of one text of full context length, by tower.

    Per layer 4 n D H h + 2 n^2 H h + 2 n D F with n tokens and head width h (12 n D^2 + 2 n^2 D when nothing is
    pruned), plus the patch embedding and the output projection.
    """
    image, text = config["vision_cfg"], config["text_cfg"]
    patches = _num_patches(image)
    embedding = patches * 3 * image["patch_size"] ** 2 * image["width"]
    return {
        "image": embedding + _tower_macs(image, patches + 1) + image["width"] * config["embed_dim"],
        "text": _tower_macs(text, text["context_length"]) + text["width"] * config["embed_dim"],
    }


def _tower_macs(tower: Mapping[str, Any], tokens: int) -> int:
    total = 0
    for heads, channels in zip(tower["heads"], tower["mlp"], strict=True):
        inner = heads * tower["head_width"]
        total += tokens * tower["width"] * (4 * inner + 2 * channels) + 2 * tokens**2 * inner
    return total
