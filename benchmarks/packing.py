"""Chats packed into rows against padded ones, and against transformers' flattened batches, as a Markdown table.

    python benchmarks/packing.py [--threads 1] [--rounds 2] [--chats 16] [--max-length 1024] [--layers 4]

One forward and backward pass of a decoder of SmolLM2's widths over a small vocabulary, and of one with half of its layers as
Mamba-2, over chats whose lengths are drawn from a log-normal law (median 150 tokens), with cross entropy of the second half
of each. All forms must give the same loss. `flattened` is what `DataCollatorWithFlattening` makes: one row of everything.
They take turns, and the table gives medians; `filled` is the share of places that hold a token.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import clock  # noqa: E402
from projects.matvlm.config import HybridConfig  # noqa: E402
from projects.matvlm.surgery import to_hybrid  # noqa: E402
from projects.matvlm.task import mixer_masks  # noqa: E402
from vlmkd.data.chats import IGNORED, Chat, ChatPipeline  # noqa: E402
from vlmkd.image_spec import ImageSpec  # noqa: E402
from vlmkd.losses.tokens import TokenObjective, token_loss  # noqa: E402
from vlmkd.models.mllm import masks  # noqa: E402

ENTRIES = 8_192


def decoder(layers: int, hybrid: bool) -> Any:
    """SmolLM2-135M's widths, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ENTRIES, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if hybrid:
        to_hybrid(model, HybridConfig(layers=list(range(1, layers, 2))), torch.Generator().manual_seed(0))
    return model


def drawn(count: int, longest: int) -> list[Chat]:
    """Chats of random tokens, the second half of each to be learned."""
    rng = random.Random(0)
    chats = []
    for number in range(count):
        length = min(longest, max(16, round(rng.lognormvariate(5.0, 0.8))))
        ids = [rng.randrange(ENTRIES) for _ in range(length)]
        targets = [IGNORED] * (length // 2) + ids[length // 2 + 1 :] + [IGNORED]
        chats.append(Chat(str(number), [(ids, targets)], []))
    return chats


def batches(chats: list[Chat], longest: int) -> dict[str, dict[str, Tensor]]:
    """What each form feeds, by name."""
    tokens: Any = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0))
    spec = ImageSpec(size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
    found = {
        name: ChatPipeline(tokens, spec, max_length=longest, pack=pack).collate(chats)
        for name, pack in (("packed", True), ("padded", False))
    }
    one = ChatPipeline(tokens, spec, max_length=sum(len(chat.rows[0][0]) for chat in chats), pack=True)
    return {**found, "transformers, flattened": one.collate(chats)}


def step(model: Any, name: str, batch: dict[str, Tensor], hybrid: bool) -> float:
    """The loss of one forward and backward pass."""
    segments = batch["segments"]
    given: dict[str, Any] = masks(segments)
    if name == "transformers, flattened":  # which finds the chats by their positions
        given.pop("attention_mask")
    if hybrid:
        given |= mixer_masks(segments)
    hidden = model.model(input_ids=batch["input_ids"], use_cache=False, **given).last_hidden_state
    learned = batch["targets"] != IGNORED
    count = int(learned.sum())
    objective = TokenObjective(weight=0.0, ce_weight=1.0 / count)
    found = token_loss(
        hidden[learned], model.lm_head.weight, None, objective, labels=batch["targets"][learned]
    )
    found.total.backward()
    return found.total.item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--chats", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fed = batches(drawn(args.chats, args.max_length), args.max_length)
    fed = {
        name: {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
        for name, batch in fed.items()
    }
    tokens = int((fed["packed"]["segments"] > 0).sum())
    print(
        f"{device}, {args.threads} thread(s), {args.layers} layers, {args.chats} chats of {tokens} tokens, fp32"
    )
    print("| decoder | form | rows x places | filled | s | ratio to packed |\n|---|---|---:|---:|---:|---:|")
    for hybrid in (False, True):
        model = decoder(args.layers, hybrid).to(device)
        seconds: dict[str, list[float]] = {name: [] for name in fed}
        losses = {}
        for turn in range(args.rounds + 1):
            for name, batch in fed.items():
                model.zero_grad()
                began = clock(device)
                losses[name] = step(model, name, batch, hybrid)
                if turn:  # the first warms up
                    seconds[name].append(clock(device) - began)
        for name, loss in losses.items():
            assert abs(loss - losses["padded"]) < 1e-3, f"{name}: loss {loss}, padded {losses['padded']}"
        base = statistics.median(seconds["packed"])
        for name, found in seconds.items():
            middle, places = statistics.median(found), fed[name]["segments"]
            kind = "half Mamba-2" if hybrid else "attention"
            shape = " x ".join(f"{size:,}" for size in places.shape)
            share = 100 * tokens / places.numel()
            print(
                f"| {kind} | {name} | {shape} | {share:.0f} % | {middle:.2f} | {middle / base:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
