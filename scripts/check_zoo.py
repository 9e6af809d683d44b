#!/usr/bin/env python
"""Check the lists of models, the repository's own weights and MODEL_ZOO.md; `--write` writes the page anew."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vlmkd import zoo
from vlmkd.errors import UserError, run_tool
from vlmkd.files import write_text

PAGE = zoo.REPOSITORY / "MODEL_ZOO.md"
HEADER = """# Model zoo

Written from `projects/*/zoo.yaml` and `vlmkd/zoo.yaml` by `python scripts/check_zoo.py --write`; do not edit this page.

`python scripts/download.py NAME` fetches and verifies an entry; `zoo:NAME` names it wherever such a model is asked for.
*Paper* is what the authors publish. *Ours* is what we measured, with the command beside it, or "not run". Parameters
are in millions; *text* leaves out the token table, which *total* includes; – is no text tower; ≈ stands before figures that were not
counted. MACs are of one image and one text, without a text tower of one image. A sha256 that we have not seen is pinned in your
cache at the first download, and a different file is refused from then on. *manual* entries are published in folders
without file addresses: `download.py NAME` says in one line which file to put where.
"""
COLUMNS = "Name | Params vision / text / total (M) | Data | Paper (%) | Ours | GMACs | Size (MB) | Licence | Link | sha256"


def markdown() -> str:
    """MODEL_ZOO.md: one table per list, then what each model came from."""
    parts = [HEADER]
    for project, content in zoo.lists().items():
        rows = [item for item in zoo.entries().values() if item.project == project]
        parts.append(f"\n## {content['title']}\n\n{content['introduction']}")
        if not rows:
            continue
        parts.append(f"\n| {COLUMNS} |\n|" + " --- |" * len(COLUMNS.split("|")))
        parts.extend("| " + " | ".join(_cells(item)) + " |" for item in rows)
        parts.append("\n| Name | Teacher | Started from | Note |\n| --- | --- | --- | --- |")
        parts.extend(
            f"| {item.name} | {item.teacher or '–'} | {item.init or '–'} | {item.note or '–'} |"
            for item in rows
        )
    return "\n".join(parts) + "\n"


def _cells(item: zoo.Entry) -> list[str]:
    decimals, sign = (0, "≈") if item.params.get("approximate") else (2, "")
    params = [
        "–" if value is None else f"{sign}{value:.{decimals}f}" if value else "not counted"
        for value in (item.params.get(tower, 0.0) for tower in ("vision", "text", "total"))
    ]
    paper = item.paper
    if item.paper_imagenet_top1 is not None:
        paper = f"IN-1K zero-shot {item.paper_imagenet_top1:.1f}"
    ours = "<br>".join("{dataset} {metric} {value:g} (`{command}`)".format(**one) for one in item.ours)
    return [
        item.name,
        " / ".join(params),
        item.data,
        f"{paper} (paper)" if paper else "–",
        ours or "not run",
        "–" if item.macs_g is None else f"{item.macs_g:g}",
        "not seen" if item.size_mb is None else f"{item.size_mb:g}",
        item.licence,
        f"[{item.kind}]({item.link})",
        f"`{item.sha256}`" if item.sha256 != zoo.PIN_AT_FIRST_DOWNLOAD else item.sha256,
    ]


def main(argv: list[str]) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write MODEL_ZOO.md from the lists")
    args = parser.parse_args(argv)
    text = markdown()
    if args.write:
        write_text(PAGE, text)
    try:
        for item in zoo.entries().values():
            if item.kind == "local":
                zoo.fetch(item.name)
    except UserError as error:
        print(f"check_zoo.py: {error}", file=sys.stderr)
        return 2
    if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        print(
            "check_zoo.py: MODEL_ZOO.md is not what the lists give; run scripts/check_zoo.py --write",
            file=sys.stderr,
        )
        return 2
    print(f"{len(zoo.entries())} zoo entries checked")
    return 0


if __name__ == "__main__":
    run_tool(main)
