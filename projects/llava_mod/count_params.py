"""Parameters of the paper's models, counted on modules without memory: nothing is downloaded.

    python -m projects.llava_mod.count_params [NAME ...] [--mode sparse] [--experts 4] [--top-k 2]

Language model without the tower, which adds 0.304 B for CLIP ViT-L/14 at 336 px. `activated` is what one token goes
through, `d2s` what stages d2s and prefer train, adaptor included.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch
from torch import nn

from projects.llava_mod.config import LlavaModConfig
from projects.llava_mod.experts import moe_layers, sparse_layers, upcycle
from projects.llava_mod.student import is_trained
from vlmkd.config import load
from vlmkd.errors import at_least, run_tool
from vlmkd.models.mllm import Projector

TOWER_WIDTH = 1024
"""Of CLIP ViT-L/14."""
SIZES = {  # layers, width, inside the feed-forward layers, heads, key-value heads, vocabulary, tied head
    "Qwen1.5-0.5B": (24, 1024, 2816, 16, 16, 151_936, True),
    "Qwen2-0.5B": (24, 896, 4864, 14, 2, 151_936, True),
    "Qwen2-1.5B": (28, 1536, 8960, 12, 2, 151_936, True),
    "Qwen1.5-1.8B": (24, 2048, 5504, 16, 16, 151_936, False),
    "Qwen1.5-7B": (32, 4096, 11008, 32, 32, 151_936, False),
    "Qwen2-7B": (28, 3584, 18944, 28, 4, 152_064, False),
}
"""As their config.json files say."""


class Counts(NamedTuple):
    """Numbers of parameters."""

    dense: int
    sparse: int
    activated: int
    d2s: int
    adaptor: int


def decoder_of(name: str) -> nn.Module:
    """The language model of SIZES without values."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    layers, width, inner, heads, kv_heads, vocabulary, tied = SIZES[name]
    config = Qwen2Config(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=inner, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        return Qwen2ForCausalLM(config)


def count(name: str, *, mode: str = "sparse", experts: int = 4, top_k: int = 2) -> Counts:
    """Counts of one model, up-cycled in the layers of `mode` (`moe_layers`)."""
    decoder: Any = decoder_of(name)
    dense = _size(decoder)
    with torch.device("meta"):
        upcycle(decoder, moe_layers(mode, len(decoder.model.layers)), experts, top_k=top_k)
        projector = Projector(TOWER_WIDTH, decoder.config.hidden_size)
    whole = nn.ModuleDict({"projector": projector, "decoder": decoder})
    given = "run_dir=x stage=d2s student.init_from=x teacher.init_from=x data.chats=[x]"
    cfg = load(LlavaModConfig, given.split())
    trained = sum(p.numel() for name, p in whole.named_parameters() if is_trained(name, cfg))
    idle = sum(_size(layer.experts) * (experts - top_k) // experts for layer in sparse_layers(decoder))
    sparse = _size(decoder)
    return Counts(dense, sparse, sparse - idle, trained, _size(projector))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def main(argv: list[str]) -> int:
    """Print a table; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", choices=[[], *SIZES], default=[])
    add("--mode", choices=["sparse", "dense", "first_half", "second_half"], default="sparse")
    add("--experts", type=at_least(1), default=4)
    add("--top-k", type=at_least(1), default=2)
    args = parser.parse_args(argv)
    if args.top_k > args.experts:
        parser.error(f"--top-k {args.top_k} of --experts {args.experts}")
    print(f"| language model | {' | '.join(Counts._fields)} |\n|---|{'---:|' * len(Counts._fields)}")
    for name in args.names or SIZES:
        found = count(name, mode=args.mode, experts=args.experts, top_k=args.top_k)
        billions = [f"{number / 1e9:.3f} B" for number in found[:-1]]
        print(f"| {name} | {' | '.join(billions)} | {found.adaptor / 1e6:.2f} M |")
    return 0


if __name__ == "__main__":
    run_tool(main)
