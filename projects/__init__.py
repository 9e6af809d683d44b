"""A folder a paper."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from vlmkd.errors import UserError, did_you_mean


def surgery_of(project: str) -> Any:
    """`surgery` of a project's `student.py`, by which its exports load; a file's word is never imported as it is.

    Raises:
        UserError: no such project, or none named.
    """
    students = Path(__file__).parent.glob("*/student.py")
    known = sorted(
        path.parent.name for path in students if "def surgery(" in path.read_text(encoding="utf-8")
    )
    otherwise = f"one of {', '.join(known)}"
    if not project:
        raise UserError(f"the export does not say whose model it is; give --project, {otherwise}")
    if project not in known:
        raise UserError(
            f"--project {project} is no project with chat models; {did_you_mean(project, known, otherwise)}"
        )
    return importlib.import_module(f"projects.{project}.student").surgery
