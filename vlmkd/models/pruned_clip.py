"""CLIP with ragged layers, as automatic TinyCLIP inheritance leaves it and the published `auto` checkpoints hold it.

Every layer has its own number of heads and FFN channels, maybe none; the bias that its output projection added stays.

Letters: B batch, T tokens, D width of the tower, H heads of the layer, F FFN channels of the layer, E embedding.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmkd.errors import UserError

Config = dict[str, Any]
State = dict[str, Tensor]

_TEXT_NAMES = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
_LAYERS = ("width", "heads", "mlp", "head_width")
_FIELDS = {
    "": ("embed_dim", "vision_cfg", "text_cfg", "activation"),
    "vision_cfg": ("image_size", "patch_size", *_LAYERS),
    "text_cfg": ("context_length", "vocab_size", *_LAYERS),
}


class OutputBias(nn.Module):
    """What is left of an output projection without inputs: its bias [1, 1, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self) -> Tensor:
        # A copy, because ZeRO 3 frees the parameter's memory after this call.
        return self.bias.view(1, 1, -1).clone()


class PrunedAttention(nn.Module):
    """x [B, T, D] -> self-attention [B, T, D]; [1, 1, D] without heads."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads, inner = heads, heads * head_width
        self.out_proj: nn.Module = nn.Linear(inner, width) if heads else OutputBias(width)
        if heads:
            self.in_proj_weight = nn.Parameter(width**-0.5 * torch.randn(3 * inner, width))
            self.in_proj_bias = nn.Parameter(torch.zeros(3 * inner))

    def attend(self, x: Tensor, causal: bool) -> Tensor:
        """What each head gives to the output projection, [B, H, T, head_width]."""
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        query, key, value = rearrange(projected, "b t (qkv h d) -> qkv b h t d", qkv=3, h=self.heads)
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        if not self.heads:
            return self.out_proj()
        return self.out_proj(rearrange(self.attend(x, causal), "b h t d -> b t (h d)"))


class PrunedMLP(nn.Module):
    """x [B, T, D] -> feed-forward layer [B, T, D]; [1, 1, D] without channels."""

    def __init__(self, width: int, channels: int, quick_gelu: bool) -> None:
        super().__init__()
        self.channels, self.quick_gelu = channels, quick_gelu
        if channels:
            self.c_fc = nn.Linear(width, channels)
        self.c_proj: nn.Module = nn.Linear(channels, width) if channels else OutputBias(width)

    def activate(self, x: Tensor) -> Tensor:
        hidden = self.c_fc(x)
        return hidden * torch.sigmoid(1.702 * hidden) if self.quick_gelu else F.gelu(hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activate(x)) if self.channels else self.c_proj()


class PrunedBlock(nn.Module):
    """Pre-norm block; a part without units keeps no LayerNorm."""

    def __init__(self, width: int, heads: int, channels: int, head_width: int, quick_gelu: bool) -> None:
        super().__init__()
        if heads:
            self.ln_1 = nn.LayerNorm(width)
        self.attn = PrunedAttention(width, heads, head_width)
        if channels:
            self.ln_2 = nn.LayerNorm(width)
        self.mlp = PrunedMLP(width, channels, quick_gelu)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = x + self.attn(self.ln_1(x) if self.attn.heads else x, causal)
        return x + self.mlp(self.ln_2(x) if self.mlp.channels else x)


class PrunedTransformer(nn.Module):
    def __init__(self, tower: Config, quick_gelu: bool) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.resblocks = nn.ModuleList(
            PrunedBlock(tower["width"], heads, channels, tower["head_width"], quick_gelu)
            for heads, channels in zip(tower["heads"], tower["mlp"], strict=True)
        )

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        for block in self.resblocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, causal, use_reentrant=False)
            else:
                x = block(x, causal)
        return x


class PrunedImageTower(nn.Module):
    """images [B, 3, h, w] -> class token [B, E], not normalised."""

    def __init__(self, tower: Config, embed_dim: int, quick_gelu: bool) -> None:
        super().__init__()
        width, patch, size = tower["width"], tower["patch_size"], tower["image_size"]
        height, length = (size, size) if isinstance(size, int) else size
        positions = (height // patch) * (length // patch) + 1
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(positions, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = PrunedTransformer(tower, quick_gelu)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))

    def forward(self, images: Tensor) -> Tensor:
        x = self.transformer(self.ln_pre(embed_patches(self, images)), causal=False)
        return self.ln_post(x[:, 0]) @ self.proj


def embed_patches(tower: Any, images: Tensor) -> Tensor:
    """Class and patch tokens with their positions [B, T, D], of our image tower or open_clip's."""
    patches = tower.conv1(images.to(tower.conv1.weight.dtype)).flatten(2).transpose(1, 2)
    # Not len(patches), which would fix the batch size of an exported graph.
    first = tower.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
    return torch.cat([first, patches], dim=1) + tower.positional_embedding.to(patches.dtype)


class PrunedTextTower(nn.Module):
    """tokens [B, T] -> causal transformer at the highest id, the end of text [B, E], not normalised."""

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
        return self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]

    @staticmethod
    def pool(x: Tensor, tokens: Tensor) -> Tensor:
        """The end-of-text position of x [B, T, D] -> [B, D]."""
        return x[torch.arange(len(x), device=x.device), tokens.argmax(dim=-1)]

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.transformer(self.embed(tokens), causal=True)
        return self.ln_final(self.pool(x, tokens)) @ self.text_projection


class PrunedCLIP(nn.Module):
    """Of a pruned config (see `check_config`), with open_clip's interface and its names inside the towers."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        check_config(config)
        self.config = config
        common = config["embed_dim"], config["activation"] == "quick_gelu"
        self.visual: nn.Module = PrunedImageTower(config["vision_cfg"], *common)
        # A module of its own, around whose call ZeRO 3 gathers the parameters.
        self.text: nn.Module = PrunedTextTower(config["text_cfg"], *common)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if config.get("logit_bias") else None

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        features = self.visual(images)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        features = self.text(tokens)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """Unit embeddings [B, E], exp(logit_scale), and logit_bias where there is one, as open_clip."""
        embeds = self.encode_image(images, normalize=True), self.encode_text(tokens, normalize=True)
        bias = () if self.logit_bias is None else (self.logit_bias,)
        return (*embeds, self.logit_scale.exp(), *bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for part in self.modules():
            if isinstance(part, PrunedTransformer):
                part.grad_checkpointing = enable

    def completed(self, state: Mapping[str, Tensor]) -> State:
        """`state` under this model's names, made complete.

        Of a removed part, files may lack the output bias, which is zero, and keep the LayerNorm and empty tensors.
        """
        wanted = self.state_dict()
        given = {
            name: tensor
            for name, tensor in own_names(state).items()
            if tensor.numel() and (name in wanted or not re.search(r"resblocks\.\d+\.ln_[12]\.", name))
        }
        for name, module in self.named_modules():
            if isinstance(module, OutputBias):
                given.setdefault(f"{name}.bias", torch.zeros_like(module.bias))
        return given


def own_names(state: Mapping[str, Tensor]) -> State:
    """open_clip.CLIP's names as PrunedCLIP's."""
    return {f"text.{name}" if name.startswith(_TEXT_NAMES) else name: value for name, value in state.items()}


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse a config that lacks a field of `_FIELDS` or contradicts itself.

    `heads` and `mlp` (FFN channels) have one number a layer; there may be `pruned` and `logit_bias` too, both bools.
    """
    told = "pruned model config:"
    for section, fields in _FIELDS.items():
        for field in fields:
            if field not in (config[section] if section else config):
                raise UserError(f"{told} field {f'{section}.{field}'.lstrip('.')} is missing")
    if config["activation"] not in ("gelu", "quick_gelu"):
        raise UserError(f"{told} activation is {config['activation']!r}; choose gelu or quick_gelu")
    for name in ("vision_cfg", "text_cfg"):
        width, heads, mlp, _ = (config[name][field] for field in _LAYERS)
        if not all(isinstance(sizes, (list, tuple)) for sizes in (heads, mlp)) or len(heads) != len(mlp):
            raise UserError(f"{told} {name}.heads and {name}.mlp must be lists of one number a layer")
        if min([*heads, *mlp, width - 1]) < 0:
            raise UserError(f"{told} {name} holds a negative size or no width")


def config_from_state_dict(
    state: Mapping[str, Tensor],
    *,
    head_width: int = 64,
    text_head_width: int | None = None,
    activation: str = "gelu",
) -> Config:
    """The ragged config of `state` (open_clip.CLIP's names, or PrunedCLIP's), read from its shapes.

    Parts that are absent or empty have 0 heads or channels. Head width (`text_head_width` of a text tower that differs)
    and activation are not in a file.
    """
    named = own_names(state)
    try:
        conv, proj = named["visual.conv1.weight"], named["visual.proj"]
        tokens, positions = named["text.token_embedding.weight"], named["text.positional_embedding"]
        patches = len(named["visual.positional_embedding"]) - 1
    except KeyError as error:
        name = error.args[0].removeprefix("text.")
        raise UserError(f"weights: {name} is missing, so this is no ViT CLIP") from None
    grid = math.isqrt(patches)
    if conv.ndim != 4 or conv.shape[1] != 3 or grid * grid != patches:
        told = f"visual.conv1.weight {[*conv.shape]} with {patches} patches"
        raise UserError(f"weights: {told} is no ViT on a square grid")
    config: Config = {
        "embed_dim": proj.shape[1],
        "pruned": True,
        "activation": activation,
        "vision_cfg": {
            "image_size": grid * conv.shape[2],
            "patch_size": conv.shape[2],
            "width": len(conv),
            **_layers(named, "visual.", head_width),
        },
        "text_cfg": {
            "context_length": len(positions),
            "vocab_size": len(tokens),
            "width": tokens.shape[1],
            **_layers(named, "text.", text_head_width or head_width),
        },
    }
    return config | ({"logit_bias": True} if "logit_bias" in named else {})


def _layers(named: State, tower: str, head_width: int) -> Config:
    prefix, rows = f"{tower}transformer.resblocks.", 3 * head_width
    heads: list[int] = []
    mlp: list[int] = []
    layers = {int(name[len(prefix) :].split(".")[0]) for name in named if name.startswith(prefix)}
    for layer in range(max(layers, default=-1) + 1):
        in_proj = len(named.get(f"{prefix}{layer}.attn.in_proj_weight", ()))
        if in_proj % rows:
            told = f"has {in_proj} rows, no multiple of 3 x head width {head_width}; tell its head width"
            raise UserError(f"weights: {prefix}{layer}.attn.in_proj_weight {told}")
        heads.append(in_proj // rows)
        mlp.append(len(named.get(f"{prefix}{layer}.mlp.c_fc.weight", ())))
    return {"heads": heads, "mlp": mlp, "head_width": head_width}
