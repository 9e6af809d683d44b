"""The nano vocabulary: ids, cleaning, cutting, and equality with open_clip's own loading of an export folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vlmkd.data.text_bpe import BpeTokenizer, text_config, train_tokenizer, write_tokenizer
from vlmkd.errors import UserError

TEXTS = [f"{size} {colour} {thing}" for size in ("large", "small") for colour in ("red", "blue", "orange")
         for thing in ("square", "diamond", "circle", "heart", "apple", "book")]  # fmt: skip
VOCABULARY, CONTEXT = 300, 12
ODD = ["", "  An\tORANGE   square ", "caf\u00e9 &amp; \u201cheart\u201d", "\U0001f34e", "apple " * 40]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(train_tokenizer(TEXTS, VOCABULARY), tmp_path, CONTEXT)
    config = {"model_cfg": {"embed_dim": 8, "vision_cfg": {}, "text_cfg": text_config(VOCABULARY, CONTEXT)}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config | {"preprocess_cfg": {}}))
    return tmp_path


def test_same_ids_as_open_clip(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    open_clip = pytest.importorskip("open_clip")
    theirs = open_clip.get_tokenizer(f"local-dir:{folder}")
    ours = BpeTokenizer(folder / "tokenizer.json", CONTEXT)
    assert torch.equal(theirs(TEXTS + ODD), ours(TEXTS + ODD))


def test_end_is_highest_and_never_cut_off(folder: Path) -> None:
    ids = BpeTokenizer(folder / "tokenizer.json", CONTEXT)(TEXTS + ODD)
    assert ids.shape == (len(TEXTS) + len(ODD), CONTEXT) and ids.dtype == torch.int64
    assert (ids[:, 0] == 1).all()
    assert (ids.max(dim=1).values == VOCABULARY - 1).all()
    assert ((ids == VOCABULARY - 1).sum(dim=1) == 1).all()
    end = ids.argmax(dim=1)
    assert all((row[stop + 1 :] == 0).all() for row, stop in zip(ids, end, strict=True))
    assert ids[-1, -1] == VOCABULARY - 1


def test_lower_cases_and_round_trips(folder: Path) -> None:
    tokenizer = BpeTokenizer(folder / "tokenizer.json", CONTEXT)
    assert torch.equal(tokenizer("RED Heart"), tokenizer(["red heart"]))
    assert tokenizer._tokenizer.decode(tokenizer("blue apple")[0].tolist()).strip() == "blue apple"


def test_training_is_deterministic_and_blind_to_order() -> None:
    assert train_tokenizer(TEXTS, VOCABULARY).to_str() == train_tokenizer(TEXTS[::-1], VOCABULARY).to_str()


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="or fewer"):
        train_tokenizer(["a b"], 4000)
    with pytest.raises(UserError, match="no tokenizer at"):
        BpeTokenizer(tmp_path / "tokenizer.json", 8)
