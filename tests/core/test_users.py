"""The core is what at least two use: names that fewer use are listed here, each module's with the reason.

Users are the projects and, counted as one, the tools (data_tools, scripts, benchmarks). A name that another module
of the core mentions, or that nothing but its own module does, is not looked at here: there it is a part of something.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
USERS = sorted(path.parent.name for path in ROOT.glob("projects/*/config.py"))

ALONE: dict[str, tuple[str, set[str]]] = {
    "config": ("the house's way of reading options", {"RatioRange"}),
    "data/teacher_outputs": (
        "what the tools that embed call, and the writer for a teacher that is no module; VL2V-ADiP's paid one is the first",
        {"Progress", "Samples", "drawn_views", "missing_items"},
    ),
    "datasets/emoji": (
        "what data_tools/build_emoji.py asks for",
        {"emoji_folder"},
    ),
    "datasets/published_sets": ("what data_tools/make_split.py calls", {"set_folder"}),
    "evaluation/answers": (
        "one record as a question, and rules of scoring, which scripts/eval_chat.py takes too",
        {"Question", "pope"},
    ),
    "evaluation/classify": ("the field's figure for base and novel classes", {"harmonic_mean"}),
    "export/classifier": ("name of a file of the folder", {"TIMM_WEIGHTS"}),
    "export/clip": (
        "parts of a CLIP's folder that scripts/export_hf.py writes and checks too",
        {"MARKS", "PROBE_TEXTS", "write_tokenizer"},
    ),
    "export/folder": ("parts of every export's check and folder", {"PROVENANCE", "compare"}),
    "export/mllm": ("a part of building a model, for the tool that embeds pictures", {"build_tower"}),
    "losses/contrastive": ("losses are offered to every project", {"sigmoid_loss"}),
    "losses/preference": (
        "preference losses are offered to every project on chats",
        {"AnswerLogProbs", "PreferenceKind", "kto_loss", "preference_loss"},
    ),
    "losses/tokens": ("token losses are offered to every project on chats", {"Taid", "TokenLoss"}),
    "data/chat_outputs": (
        "what the tools that embed chats and pictures write",
        {"FeaturesInfo", "picture_key"},
    ),
    "chat_runs": (
        "which files of chats are shards, for data_tools/embed_chats.py too; what tools open and compare exports with",
        {"check_alike", "is_shards"},
    ),
    "data/chats": (
        "the reasons for dropping one, for the tests; the templates for the tools' options, what a record is, for the tools of shards, "
        "and a picture, for the one that embeds them",
        {"Chat", "REASONS", "TEMPLATES", "decoded", "parts_of"},
    ),
    "models/checkpoints": ("the one spelling of weights, for scripts/export_hf.py", {"normalise_names"}),
    "models/class_vectors": ("types and parts of the one builder", {"Normalise", "class_prompts"}),
    "models/convert": ("what both directions of one conversion share", {"ARGMAX_EOS"}),
    "models/heads": ("a head that exports and `load_classifier` know", {"DualHead", "KdHead"}),
    "models/prompted": (
        "parts of the prompted image tower, which backbones load",
        {"INIT_STD", "check_depth"},
    ),
    "models/pruned_clip": (
        "parts of the pruned CLIP, which `load_clip` loads for everybody",
        {"PrunedAttention", "PrunedImageTower", "PrunedMLP", "own_names"},
    ),
    "models/text_tower": (
        "parts of encoding texts, which `load_clip` uses",
        {"encode_causal", "read_at", "up_to"},
    ),
    "models/towers": (
        "any CLIP in one call, and what a frozen one does with another's pixels",
        {"ClipOutput", "ClipTowers", "convert_images"},
    ),
    "page/report": (
        "what scripts/report.py and scripts/distill_folder.py call",
        {"columns_of", "main_set", "millions", "read_run"},
    ),
    "results": ("how a number is written in every table", {"show"}),
    "train/engine": (
        "a list of choices, for the tools; experts over ranks, because DeepSpeed is known here alone",
        {"PRECISIONS", "all_experts", "spread_experts"},
    ),
    "train/selection": ("which weights count is decided in one place", {"MovingAverage"}),
    "train/trainer": ("parts of the loop", {"stream_seed"}),
    "zoo": ("what scripts/check_zoo.py writes the page from", {"PIN_AT_FIRST_DOWNLOAD", "lists"}),
}
"""Module -> why the names stay, and the names."""


def mentioned(path: Path) -> set[str]:
    """Every name that a file uses or imports, however it reaches it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names}
    return found


def defined(path: Path) -> set[str]:
    """The public functions, classes and constants of a module."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in found if not name.startswith("_")}


def names_with_few_users() -> dict[str, set[str]]:
    """Module below vlmkd/ -> its names that one user alone mentions, or nobody."""
    used = [set().union(*map(mentioned, (ROOT / "projects" / name).rglob("*.py"))) for name in USERS]
    tools = [path for name in ("data_tools", "scripts", "benchmarks") for path in (ROOT / name).rglob("*.py")]
    used.append(set().union(*map(mentioned, tools)))
    core = {path: mentioned(path) for path in (ROOT / "vlmkd").rglob("*.py")}
    found = {}
    for path, own in core.items():
        others = set().union(*(names for other, names in core.items() if other != path))
        few = set()
        for name in defined(path) - others:
            users = sum(name in names for names in used)
            if users == 1 or (users == 0 and name not in own):
                few.add(name)
        if few:
            found[path.relative_to(ROOT / "vlmkd").with_suffix("").as_posix()] = few
    return found


def test_each_name_of_the_core_has_two_users_or_a_reason() -> None:
    """Move the name to the project that uses it, delete it, or say here why the core keeps it."""
    few = names_with_few_users()
    unlisted = {module: sorted(names - ALONE.get(module, ("", set()))[1]) for module, names in few.items()}
    assert not {module: names for module, names in unlisted.items() if names}
    stale = {module: sorted(names - few.get(module, set())) for module, (_, names) in ALONE.items()}
    assert not {module: names for module, names in stale.items() if names}, "take them off the list"
    assert all(reason for reason, _ in ALONE.values())
