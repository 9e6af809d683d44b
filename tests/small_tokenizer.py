"""A small byte-level BPE vocabulary in the files that open_clip and transformers read, for tests of model folders.

Ids: 0 pads, 1 starts a text, the highest id ends it, so that open_clip's `argmax` pooling finds the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from vlmkd.files import write_text

PAD, START, END = "<pad>", "<start>", "<end>"


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Learn a lower-casing byte-level BPE with exactly `vocabulary` ids, the special ones included.

    The same texts give the same file.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 1,
        special_tokens=[PAD, START],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(texts), trainer)
    tokenizer.add_special_tokens([END])
    assert tokenizer.get_vocab_size() == vocabulary, "the texts are too few for that many merges"
    end = tokenizer.token_to_id(END)
    assert (tokenizer.token_to_id(PAD), tokenizer.token_to_id(START), end) == (0, 1, vocabulary - 1)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, 1), (END, end)]
    )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` as transformers' AutoTokenizer reads them."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": START,
        "eos_token": END,
        "pad_token": PAD,
        "padding_side": "right",
        "truncation_side": "right",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    files = {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(config, indent=1)}
    for name, text in files.items():
        write_text(folder / name, text + "\n")


def text_config(vocabulary: int, context: int) -> dict[str, Any]:
    """What an open_clip `text_cfg` must say for this tokenizer; open_clip reads it from the folder itself.

    Any non-empty `hf_tokenizer_name` selects the folder's own files under `local-dir:`.
    """
    return {
        "context_length": context,
        "vocab_size": vocabulary,
        "hf_tokenizer_name": "tokenizer.json",
        "pool_type": "argmax",
        "pad_id": 0,
        "eos_id": vocabulary - 1,
    }
