"""Commands in the documents name files that exist; attributions cover what is used; nothing names this machine."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    {
        *ROOT.glob("*.md"),
        *ROOT.glob("projects/*/README.md"),
        *ROOT.glob("benchmarks/*.md"),
        *ROOT.glob("docs/**/*.md"),
    }
)
SCRIPTS = sorted({*ROOT.glob("scripts/*.sh"), *ROOT.glob("projects/*/scripts/*")})
OURS = ("projects/", "scripts/", "data_tools/", "benchmarks/", "vlmkd/", "tests/", "docs/")


def bash_blocks(text: str) -> list[str]:
    """Contents of fenced bash blocks, with continued lines joined."""
    blocks = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, flags=re.M | re.S)
    return [block.replace("\\\n", " ") for block in blocks]


def files_named(commands: str) -> list[str]:
    """Words of bash commands that look like files or folders of this repository."""
    named = []
    for line in commands.splitlines():
        words = shlex.split(line, comments=True)
        named += [word for word in words if word.startswith(OURS) and not set(word) & set("*{}$<>|")]
    return [word.split("::")[0] for word in named]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_name_files_that_exist(path: Path) -> None:
    for block in bash_blocks(path.read_text(encoding="utf-8")):
        for name in files_named(block):
            assert (ROOT / name).exists(), f"{path.name}: {name} does not exist"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target, section in re.findall(r"\]\(([^)#\s]*)(?:#([\w-]+))?[^)]*\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        page = path.parent / target if target else path
        assert page.exists(), f"{path.name}: link to {target}"
        assert not section or section in sections(page), f"{path.name}: link to {target}#{section}"


def sections(page: Path) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_files_that_text_and_code_name_exist() -> None:
    """Paths in sentences, comments and docstrings, from the root or from a folder above; file names in documents; and
    dotted names of modules, classes and functions in documents."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [Path(line) for line in listed.splitlines()]
    names = {path.name for path in files}
    missing = []
    for path in files:
        if path.suffix not in (".py", ".md", ".sh", ".sbatch", ".yaml", ".toml") or path.parts[0] == "tests":
            continue
        text = (ROOT / path).read_text(encoding="utf-8").replace("docs/EVAL.md", "")  # PromptSRC's
        found = re.findall(
            rf"(?<![\w/.}}*{{-])(?:{'|'.join(OURS)})[\w./-]+\.(?:py|sh|md|yaml|json|txt)\b", text
        )
        for name in (name for name in found if "PAPER" not in name):
            if not any((ROOT / folder / name).exists() for folder in path.parents):
                missing.append(f"{path}: {name}")
        if path.suffix == ".md":
            bare = re.findall(r"`([\w-]+\.(?:py|sh|sbatch))`", text)
            missing += [f"{path}: {name}" for name in bare if name not in names]
            dotted = re.findall(r"\b(?:vlmkd|projects)(?:\.[a-zA-Z_]\w*)+", text)
            missing += [f"{path}: {name}" for name in dotted if not _defined(name.split("."))]
    assert not missing, "\n".join(missing)


def _defined(parts: list[str]) -> bool:
    """Whether `vlmkd.module.name` is a module, or a name that stands in one."""
    for end in range(len(parts), 1, -1):
        module = ROOT.joinpath(*parts[:end]).with_suffix(".py")
        if module.exists():
            return end == len(parts) or re.search(rf"\b{parts[end]}\b", module.read_text("utf-8")) is not None
    return ROOT.joinpath(*parts).is_dir()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_scripts_parse_and_name_files_that_exist(path: Path) -> None:
    parsed = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert parsed.returncode == 0, parsed.stderr
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for name in re.findall(
        r"(?<![\w/}])(?:projects|scripts|data_tools)/[\w/.-]+\.(?:py|sh|yaml)\b", "\n".join(commands)
    ):
        if "PAPER" not in name:
            assert (ROOT / name).exists(), f"{path.name}: {name} does not exist"


def test_the_tree_of_the_readme_has_every_folder() -> None:
    """Each folder of the core, each project, each folder at the top; and no folder that is not there."""
    (tree,) = re.findall(
        r"^## Layout\n+```\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), flags=re.M | re.S
    )
    above: list[str] = []
    named = set()
    for line in tree.splitlines():
        entry = re.match(r"( *)(\S+/) ", line)
        if entry is None:  # a sentence goes on
            continue
        indent, name = entry.groups()
        above = [*above[: len(indent) // 2], name]
        named.add("".join(above).rstrip("/"))
    for folder in named:
        assert any(ROOT.glob(folder.replace("<paper>", "*"))), f"README's tree names {folder}"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = {Path(line).parent for line in listed.splitlines()}
    there = {
        str(Path(*folder.parts[: 1 + (folder.parts[0] in ("vlmkd", "projects"))]))
        for folder in folders
        if folder.parts
    }
    assert {folder for folder in there if not folder.startswith(".")} <= named


def test_attributions_cover_the_data() -> None:
    text = (ROOT / "ATTRIBUTIONS.md").read_text(encoding="utf-8")
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    data_packages = re.findall(r"^([\w-]+)", requirements.split("The `emoji` data set")[1], flags=re.M)
    extra = re.search(r"^emoji = \[(.*)\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.M)
    assert extra is not None and len(data_packages) >= 5
    for name in data_packages + re.findall(r'"([\w-]+)', extra[1]):
        assert f"`{name}`" in text, f"ATTRIBUTIONS.md does not name {name}"


def test_attributions_name_every_photograph() -> None:
    from data_tools.emoji.catalog import TABLES

    text = (ROOT / "ATTRIBUTIONS.md").read_text(encoding="utf-8")
    for name in TABLES["photographs"]:
        assert f"`{Path(name).stem}`" in text, f"ATTRIBUTIONS.md does not name the photograph {name}"


def test_the_licence_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_ci_runs_the_test_script() -> None:
    lines = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == ["bash scripts/test.sh"]
