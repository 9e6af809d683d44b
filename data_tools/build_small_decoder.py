"""Write a small random language model over the words of some chats, as a folder that `decoder: hf:FOLDER` reads.

    python data_tools/build_small_decoder.py FOLDER --chats runs/scenes/train.json --layers 4 --width 192

A Llama with grouped-query heads, and a byte-level BPE that was learned from what the chats say, ChatML's tokens with it.
The same chats, sizes and seed give the same folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vlmkd.data.chats import IMAGE, read_chats
from vlmkd.errors import at_least, run_tool
from vlmkd.files import new_folder

HEAD = 32
"""Width of a head; a third or less of the heads are keys' and values'."""


def words_of(path: str) -> Iterator[str]:
    """What is said in the chats of a file."""
    for item in read_chats(path, ""):
        for turn in item.record.get("conversations", []):
            yield str(turn["value"]).replace(IMAGE, "")


def tokenizer_of(chats: str, vocabulary: int) -> Any:
    """A byte-level BPE of at most so many ids."""
    from transformers import GPT2Tokenizer

    empty: Any = GPT2Tokenizer()
    chatml = ["<|im_start|>", "<|im_end|>"]
    made = empty.train_new_from_iterator(
        words_of(chats), vocabulary, new_special_tokens=chatml, show_progress=False
    )
    made.pad_token = made.eos_token
    return made


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, help="where to")
    add("--chats", required=True, help="LLaVA JSON file that the words come from")
    add("--vocabulary", type=at_least(300), default=1024, help="most ids (default 1024)")
    add("--layers", type=at_least(1), default=4, help="layers (default 4)")
    add("--width", type=at_least(HEAD), default=192, help=f"width, a multiple of {HEAD} (default 192)")
    add("--seed", type=int, default=0, help="of the weights (default 0)")
    args = parser.parse_args(argv)
    if args.width % HEAD:
        parser.error(f"--width is {args.width}; give a multiple of {HEAD}")
    folder = new_folder(args.folder, "decoder")
    tokenizer = tokenizer_of(args.chats, args.vocabulary)

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = args.width // HEAD
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=args.width, intermediate_size=args.width * 8 // 3,
        num_hidden_layers=args.layers, num_attention_heads=heads, tie_word_embeddings=True,
        num_key_value_heads=next(n for n in range(max(1, heads // 3), 0, -1) if heads % n == 0),
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"wrote {folder}: {args.layers} layers of {args.width}, {len(tokenizer)} ids, {count / 1e6:.2f} M parameters"
    )
    return 0


if __name__ == "__main__":
    run_tool(main)
