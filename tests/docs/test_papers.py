"""What code and documents cite of docs/papers exists: the page, its equation, its section."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.docs.test_documents import sections

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs/papers").glob("*.md"))
CITED = re.compile(r"docs/papers/(\w+)\.md(?:#([\w-]+)|,\s+eq\. ([\d, and-]*\d))?")
"""`docs/papers/dho.md`, `docs/papers/dho.md, eq. 3 and 5-7`, `docs/papers/dho.md#checkpoints`."""
OTHERWISE = re.compile(r"docs/papers/\w+\.md, (?:\d+|[A-Z]\w*)")
"""What looks like a citation and is none of these: `docs/papers/dho.md, 3`, `docs/papers/dho.md, Recipe`."""


def equations(page: Path) -> list[int]:
    """Numbers of the equations, in the order of the page: `(3)` at the start of a line of a text block."""
    blocks = re.findall(r"^```text\n(.*?)^```", page.read_text("utf-8"), flags=re.M | re.S)
    return [int(number) for number in re.findall(r"^\((\d+)\) ", "".join(blocks), flags=re.M)]


def numbers(text: str) -> list[int]:
    """`3`, `3, 5 and 7-9` as numbers."""
    found = []
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        found += range(int(first), int(last or first) + 1)
    return found


def wrong_citations(text: str) -> list[str]:
    """The citations of `text` that lead nowhere. Lines are joined first, comment marks and indents left out."""
    text = re.sub(r"\n\s*(?:#+ )?", " ", text)
    wrong = OTHERWISE.findall(text)
    for cited in CITED.finditer(text):
        name, section, given = cited.groups()
        page = ROOT / f"docs/papers/{name}.md"
        known = page in PAGES
        if known and section:
            known = section in sections(page)
        if known and given:
            known = set(numbers(given)) <= set(equations(page))
        if not known:
            wrong.append(cited[0])
    return wrong


def test_citations_lead_somewhere() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "*.py", "*.md", "*.sh", "*.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    files = [ROOT / line for line in listed.stdout.splitlines() if line != "tests/docs/test_papers.py"]
    texts = {path: path.read_text("utf-8") for path in files if path.is_file()}
    wrong = {str(path.relative_to(ROOT)): wrong_citations(text) for path, text in texts.items()}
    assert not {path: cited for path, cited in wrong.items() if cited}
    code = "\n".join(text for path, text in texts.items() if path.suffix == ".py")
    for page in PAGES:
        assert f"docs/papers/{page.name}, eq. " in code, f"no code cites an equation of {page.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_equations_are_numbered_in_order(page: Path) -> None:
    assert equations(page) == list(range(1, len(equations(page)) + 1)) != []


def test_every_project_has_its_page() -> None:
    projects = {path.parent.name for path in (ROOT / "projects").glob("*/config.py")}
    assert projects == {page.stem for page in PAGES}
    for name in projects:
        assert f"docs/papers/{name}.md" in (ROOT / f"projects/{name}/README.md").read_text("utf-8")


def test_what_leads_nowhere_is_found() -> None:
    text = (
        "docs/papers/dho.md, eq. 3 and 5-7; docs/papers/dho.md#checkpoints;\n    docs/papers/dho.md, eq. 99;\n"
        "docs/papers/dho.md, eq. 3-99 and docs/papers/none.md and docs/papers/dho.md#none, docs/papers/dho.md,\n"
        "# eq. 98; docs/papers/dho.md, 5"
    )
    assert wrong_citations(text) == [
        "docs/papers/dho.md, 5",
        "docs/papers/dho.md, eq. 99", "docs/papers/dho.md, eq. 3-99", "docs/papers/none.md",
        "docs/papers/dho.md#none", "docs/papers/dho.md, eq. 98",
    ]  # fmt: skip
