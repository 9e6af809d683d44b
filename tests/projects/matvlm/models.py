"""What the tests of runs share: a tiny random Llama with its tokenizer, a tiny tower, and chats about drawn scenes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.chat_parts import byte_tokenizer, picture
from vlmkd.export.folder import write_tensors
from vlmkd.models.clip import build_clip

LAYERS = 8


def tower_files(folder: Path) -> str:
    """The image tower of a random CLIP, 16 pixels and 4 patches wide, as a config names it."""
    part = {"width": 16, "layers": 2}
    config = {
        "embed_dim": 16,
        "vision_cfg": {**part, "image_size": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {**part, "context_length": 8, "vocab_size": 64, "heads": 2},
    }
    (folder / "clip.json").write_text(json.dumps(config))
    write_tensors(folder / "clip.safetensors", build_clip(config, seed=0).state_dict())
    return f"clip:{folder / 'clip.json'}@{folder / 'clip.safetensors'}"


def decoder_folder(folder: Path) -> Path:
    """Eight layers, grouped-query heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=24, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, eos_token_id=256, pad_token_id=256,
        bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def scenes(folder: Path) -> Path:
    """Eight records, every fourth without an image."""
    folder.mkdir(parents=True)
    records = []
    for number in range(8):
        question, answer = f"{'What' * (1 + number % 3)}?", "red" if number % 2 else "a blue dot"
        image = {} if number % 4 == 3 else {"image": f"{number}.png"}
        (folder / f"{number}.png").write_bytes(picture(number))
        text = f"<image>\n{question}" if image else question
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
        records.append({"id": str(number), "kind": "colour", "conversations": turns, **image})
    path = folder / "chats.json"
    path.write_text(json.dumps(records))
    return path


def fields(folder: Path) -> list[str]:
    """Overrides of a run on both."""
    decoder, chats = decoder_folder(folder / "llama"), scenes(folder / "scenes")
    return [
        f"student.tower={tower_files(folder)}", f"student.decoder=hf:{decoder}", f"data.chats=[{chats}]",
        "data.workers=0", "data.template=plain", "steps=3", "batch_size=4", "threads=1", "log.every_steps=1",
        "optim.lr=1e-3", "optim.warmup_steps=0", "optim.clip_grad_norm=0.1", "checkpoint.every_steps=1",
        "evaluation.batch_size=4", f"evaluation.questions=[{{data: {chats}}}]", "hybrid.chunk=16",
    ]  # fmt: skip
