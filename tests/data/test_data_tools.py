"""The command-line tools of data_tools/, called the way a user does."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlmkd.data.shards import read_shard
from vlmkd.data.teacher_outputs import TeacherOutputs
from vlmkd.errors import UserError
from vlmkd.models.clip import ClipModel

ROOT = Path(__file__).resolve().parents[2]


def tool(name: str):
    spec = importlib.util.spec_from_file_location(f"data_tools_{name}", ROOT / "data_tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def contents(folder: Path) -> list[tuple[str, bytes, str]]:
    """(extension, image, caption) of all samples, sorted by caption."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        for raw in read_shard(str(path)):
            [(extension, image)] = [(name, data) for name, data in raw.members.items() if name != "txt"]
            found.append((extension, image, raw.members["txt"].decode()))
    return sorted(found, key=lambda item: item[2])


@pytest.fixture
def pictures(tmp_path, encoded_image):
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    names = [f"{number}.jpg" for number in range(9)] + ["sub/x.png"]
    for number, name in enumerate(names):
        (folder / name).write_bytes(encoded_image(number, kind="PNG" if name.endswith("png") else "JPEG"))
    return folder, [(name, f"caption {number}, of {name}") for number, name in enumerate(names)]


def captions_file(path: Path, pairs, layout: str) -> Path:
    if layout in ("csv", "tsv"):
        mark = "," if layout == "csv" else "\t"
        rows = [f'{name}{mark}"{caption}"' for name, caption in pairs]
        path.write_text("\n".join([f"filepath{mark}title", *rows]) + "\n")
    elif layout == "dict":
        path.write_text(json.dumps(dict(pairs)))
    elif layout == "list":
        path.write_text(json.dumps([{"filepath": name, "title": caption} for name, caption in pairs]))
    else:
        images = [{"id": number + 100, "file_name": name} for number, (name, _) in enumerate(pairs)]
        notes = [{"image_id": number + 100, "caption": caption} for number, (_, caption) in enumerate(pairs)]
        path.write_text(json.dumps({"images": images, "annotations": notes}))
    return path


@pytest.mark.parametrize("layout", ["csv", "tsv", "dict", "list", "coco"])
def test_images_and_captions_become_shards(layout, pictures, tmp_path, capsys):
    folder, pairs = pictures
    captions = captions_file(tmp_path / f"c.{'csv' if layout in ('csv', 'tsv') else 'json'}", pairs, layout)
    out = tmp_path / "out"
    arguments = ["--images", str(folder), "--captions", str(captions), "--num-shards", "3", "--out"]
    assert tool("images_to_shards").main([*arguments, str(out)]) == 0
    assert "10 samples in 3 shards" in capsys.readouterr().out
    expected = [(name.rsplit(".")[1], (folder / name).read_bytes(), caption) for name, caption in pairs]
    assert contents(out) == sorted(expected, key=lambda item: item[2])
    manifest = json.loads((out / "manifest.json").read_text())
    assert [entry["samples"] for entry in manifest["shards"]] == [4, 3, 3] and manifest["samples"] == 10
    for entry in manifest["shards"]:
        data = (out / entry["name"]).read_bytes()
        assert entry["sha256"] == hashlib.sha256(data).hexdigest() and entry["bytes"] == len(data)
    assert json.loads((out / "sizes.json").read_text()) == {"00000.tar": 4, "00001.tar": 3, "00002.tar": 3}
    tool("images_to_shards").main([*arguments, str(tmp_path / "again")])
    for path in out.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_reshard_keeps_every_sample_and_makes_keys_unique(make_shards, pair, tmp_path, capsys):
    shards = make_shards(
        [5, 5], lambda shard, number, members: members * 2 if (shard, number) == (0, 4) else None
    )
    out = tmp_path / "out"
    assert tool("images_to_shards").main(["--reshard", *shards, "--out", str(out), "--num-shards", "4"]) == 0
    assert (
        "10 samples in 4 shards" in (told := capsys.readouterr().out) and "1 left out (duplicate_key)" in told
    )
    assert contents(out) == contents(tmp_path / "shards")[:4] + contents(tmp_path / "shards")[5:]
    keys = [raw.key for path in out.glob("*.tar") for raw in read_shard(str(path))]
    assert len(set(keys)) == 10


def test_a_share_of_the_captions_is_passed_on(make_shards, tmp_path):
    shards = make_shards([6, 6])
    main = tool("images_to_shards").main
    arguments = ["--reshard", *shards, "--num-shards", "1", "--wrong-captions"]
    assert main([*arguments, "0.5", "--out", str(tmp_path / "noisy")]) == 0
    before = {image: caption for _, image, caption in contents(tmp_path / "shards")}
    after = {image: caption for _, image, caption in contents(tmp_path / "noisy")}
    assert before.keys() == after.keys() and sorted(before.values()) == sorted(after.values())
    assert sum(before[image] != after[image] for image in before) == 6
    with pytest.raises(UserError, match="--wrong-captions is 1.5"):
        main([*arguments, "1.5", "--out", str(tmp_path / "more")])
    with pytest.raises(UserError, match="goes with --reshard"):
        main(["--wrong-captions", "0.5", "--out", str(tmp_path / "more")])


def test_packing_mistakes_are_named_and_leave_nothing_behind(pictures, make_shards, tmp_path):
    folder, pairs = pictures
    main = tool("images_to_shards").main
    out = tmp_path / "out"

    def refused(message, *arguments, rows=pairs, layout="csv"):
        captions = captions_file(tmp_path / "c.csv", rows, layout)
        with pytest.raises(UserError, match=message):
            main(["--images", str(folder), "--captions", str(captions), "--out", str(out), *arguments])
        assert not out.exists() or not list(out.iterdir())

    refused("999.jpg: no such image", rows=[*pairs, ("999.jpg", "x")])
    refused("x.tiff: not an image of type", rows=[("x.tiff", "x")])
    refused("no column 'text', only .*set --caption-column", "--caption-column", "text")
    refused("10 samples do not fill 11 shards", "--num-shards", "11")
    refused("--reshard needs --num-shards", "--reshard", "x")
    (tmp_path / "c.json").write_text("[1]")
    with pytest.raises(UserError, match="not a captions JSON"):
        main(["--images", str(folder), "--captions", str(tmp_path / "c.json"), "--out", str(out)])
    [shard] = make_shards([3])
    Path(shard).write_bytes(Path(shard).read_bytes()[:3000])
    with pytest.raises(UserError, match="000.tar: .* is broken"):
        main(["--reshard", shard, "--num-shards", "1", "--out", str(out)])
    assert not list(out.iterdir())
    with pytest.raises(UserError, match="holds shards already"):
        main(
            [
                "--images",
                str(folder),
                "--captions",
                str(captions_file(tmp_path / "c.csv", pairs, "csv")),
                "--out",
                str(tmp_path / "shards"),
            ]
        )


def test_pairs_without_a_caption_are_left_out_and_told(pictures, tmp_path, capsys):
    folder, pairs = pictures
    captions = captions_file(
        tmp_path / "c.json", [(name, caption if name != "3.jpg" else " ") for name, caption in pairs], "dict"
    )
    tool("images_to_shards").main(
        ["--images", str(folder), "--captions", str(captions), "--out", str(tmp_path / "o")]
    )
    assert (
        "9 samples in 1 shards" in (told := capsys.readouterr().out)
        and "1 left out (missing_caption)" in told
    )


def test_index_writes_and_merges_sizes(make_shards, tmp_path, capsys):
    shards = make_shards(
        [3, 5], lambda shard, number, members: members * 2 if (shard, number) == (1, 4) else None
    )
    main = tool("index_shards").main
    assert main([shards[0]]) == 0
    assert main([shards[1]]) == 0
    assert json.loads((tmp_path / "shards" / "sizes.json").read_text()) == {"000.tar": 3, "001.tar": 5}
    with pytest.raises(UserError, match="is not a local file"):
        main(["https://host/a.tar"])
    Path(shards[0]).write_bytes(Path(shards[0]).read_bytes()[:3000])
    with pytest.raises(UserError, match="000.tar: .* is broken"):
        main(shards)


def test_check_lists_what_training_would_drop(make_shards, capsys, encoded_image):
    def spoil(shard, number, members):
        image, text = members
        spoilt = {
            2: [(image[0], image[1][:300]), text],
            3: [image],
            4: [text],
            5: [(image[0], encoded_image(0, (50, 50))), text],
            6: [image, text, image, text],
        }
        return spoilt.get(number)

    [shard] = make_shards([9], spoil)
    main = tool("check_shards").main
    assert main([shard, "--max-pixels", "2000"]) == 1
    *bad, last = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[:2] for line in bad] == [
        ["undecodable_image", "000/0002"],
        ["missing_caption", "000/0003"],
        ["missing_image", "000/0004"],
        ["oversized_image", "000/0005"],
        ["duplicate_key", "000/0006"],
    ]
    assert last == (
        "10 samples, 5 bad: duplicate_key 1, missing_caption 1, missing_image 1, oversized_image 1, undecodable_image 1"
    )
    [good] = make_shards([4])
    assert main([good]) == 0
    assert capsys.readouterr().out == "4 samples, 0 bad\n"
    Path(good).write_bytes(Path(good).read_bytes()[:4000])
    assert main([good, "--headers-only"]) == 1
    assert "broken_tar\t000\t" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["images_to_shards", "index_shards", "check_shards"])
def test_as_a_command_a_mistake_is_one_line_and_exit_code_2(name, tmp_path):
    arguments = {
        "images_to_shards": ["--out", "out"],
        "index_shards": ["nothing-*.tar"],
        "check_shards": ["nothing-*.tar"],
    }[name]
    run = subprocess.run(
        [sys.executable, ROOT / "data_tools" / f"{name}.py", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and run.stdout == ""
    assert len(run.stderr.splitlines()) == 1 and "Traceback" not in run.stderr
    assert list(tmp_path.iterdir()) == []


class TinyClip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual, self.text = nn.Linear(3 * 16 * 16, 6), nn.Embedding(300, 6)
        self.logit_scale = nn.Parameter(torch.tensor(3.0))
        self.logit_bias = None

    def encode_image(self, images, normalize=False):
        return self.visual(images.flatten(1))

    def encode_text(self, tokens, normalize=False):
        return self.text(tokens).sum(1)


def test_embed_teacher_wraps_a_loaded_clip(make_shards, tmp_path, spec, tokenizer, monkeypatch, capsys):
    torch.manual_seed(0)
    module = TinyClip()
    called = []

    def load_clip(model, pretrained=""):
        called.append((model, pretrained))
        digest = "f" * 64 if pretrained else ""
        return ClipModel(
            module=module, config={}, image_spec=spec, tokenizer=tokenizer, source="tiny@tag", digest=digest
        )

    embed_teacher = tool("embed_teacher")
    monkeypatch.setattr(embed_teacher, "load_clip", load_clip)
    shards = make_shards([4, 3])
    arguments = [
        "--model",
        "tiny",
        "--pretrained",
        "tag",
        "--shards",
        *shards,
        "--out",
        str(tmp_path / "cache"),
    ]
    assert (
        embed_teacher.main(
            [*arguments, "--crops", "2", "--batch-size", "3", "--flip", "0.5", "--device", "cpu"]
        )
        == 0
    )
    told = capsys.readouterr().out.splitlines()
    assert called == [("tiny", "tag")] and len(told) == 3 and told[-1] == f"{tmp_path / 'cache'} is complete"
    info = json.loads((tmp_path / "cache" / "cache.json").read_text())["info"]
    assert info["source"] == "tiny@tag" and info["digest"] == "f" * 64 and info["views"]["flip"] == 0.5
    assert info["logit_scale"] == pytest.approx(float(torch.tensor(3.0).exp())) and info["crops"] == 2
    stored = TeacherOutputs(tmp_path / "cache").get("0002", "001").columns["text_embeds"]
    expected = F.normalize(module.encode_text(tokenizer(["picture 1 2"])), dim=-1)[0]
    torch.testing.assert_close(stored.float(), expected.detach(), rtol=0, atol=1e-3)
    with pytest.raises(UserError, match="--crops and --batch-size must be at least 1"):
        embed_teacher.main([*arguments, "--crops", "0"])
    with pytest.raises(
        UserError, match="--model tiny alone has random weights; name the trained ones with --pretrained"
    ):
        embed_teacher.main(["--model", "tiny", "--shards", *shards, "--out", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()
