"""A small byte-level BPE vocabulary for nano models, in the files that open_clip and transformers read.

A folder with `tokenizer.json`, `tokenizer_config.json` and an `open_clip_config.json` whose `text_cfg` holds
`text_config(...)` gives the same ids through `open_clip.get_tokenizer("local-dir:FOLDER")` as through `BpeTokenizer`.

Ids: 0 pads, 1 starts a text, the highest id ends it, so that open_clip's `argmax` pooling finds the end.
Shapes: N texts, T tokens.
"""

from __future__ import annotations

import html
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ftfy
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from vlmkd.errors import UserError
from vlmkd.files import write_text

PAD, START, END = "<pad>", "<start>", "<end>"
EMOJI_VOCABULARY = 2048
EMOJI_CONTEXT = 20
"""Holds 98 % of the training captions whole; the longest, of three long names, are cut."""


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Learn a lower-casing byte-level BPE with exactly `vocabulary` ids, the special ones included.

    The same texts give the same file. Raises UserError when the texts are too few for that many merges.
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
    size = tokenizer.get_vocab_size()
    if size != vocabulary:
        raise UserError(
            f"the texts give a vocabulary of {size} ids only, not {vocabulary}; ask for {size} or fewer"
        )
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


class BpeTokenizer:
    """Callable from texts to ids int64 [N, T], cleaned as open_clip's HFTokenizer cleans them."""

    def __init__(self, file: Path, context: int) -> None:
        """Read a tokenizer.json; raises UserError when it is absent."""
        if not file.is_file():
            raise UserError(
                f"no tokenizer at {file}; write_tokenizer makes one, or copy it from the model's export"
            )
        self._tokenizer = Tokenizer.from_file(str(file))
        self._tokenizer.enable_truncation(context)
        self._tokenizer.enable_padding(length=context, pad_id=0, pad_token=PAD)
        self.context_length = context
        self.vocab_size = self._tokenizer.get_vocab_size()

    def __call__(self, texts: str | list[str]) -> Tensor:
        """Tokenise; longer texts are cut and still end with the end token."""
        texts = [texts] if isinstance(texts, str) else texts
        clean = [" ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()) for text in texts]
        encoded = self._tokenizer.encode_batch(clean)
        return torch.tensor([item.ids for item in encoded], dtype=torch.long).reshape(
            len(texts), self.context_length
        )


def captions_in(shards: Iterable[str], text_key: str = "txt") -> list[str]:
    """All captions of webdataset tars, in order."""
    found = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(f".{text_key}"):
                    stream = tar.extractfile(member)
                    assert stream is not None
                    found.append(stream.read().decode("utf-8"))
    return found


def emoji_tokenizer() -> Path:
    """The emoji data set's tokenizer.json, trained on its training captions, class names and test templates.

    It lies in a folder of its own beside the data set in the cache and is made when absent.
    """
    from vlmkd.datasets.emoji.cache import emoji_folder, resolve
    from vlmkd.datasets.emoji.catalog import TEST_TEMPLATES, class_names

    data = emoji_folder()
    folder = data.parent / f"{data.name}-tokenizer"
    file = folder / "tokenizer.json"
    if not (file.is_file() and (folder / "tokenizer_config.json").is_file()):
        prompts = [template.format(c=name) for template in TEST_TEMPLATES for name in class_names()]
        tokenizer = train_tokenizer(captions_in(resolve("emoji:train")) + prompts, EMOJI_VOCABULARY)
        write_tokenizer(tokenizer, folder, EMOJI_CONTEXT)
    return file
