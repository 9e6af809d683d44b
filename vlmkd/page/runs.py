"""What a run folder says, for tables and page."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from vlmkd.files import read_object, read_text
from vlmkd.results import (
    FILE,
    PARAMETERS,
    STUDENT,
    TEACHER,
    Number,
    json_lines,
    last_of,
    latest,
    read_results,
)

MODELS, DETAILS = "models.json", "details.json"
Key = tuple[str, str]
"""Data set and metric."""


class Run:
    """A run folder, or an evaluation command's results file; what it lacks is empty."""

    def __init__(self, path: Path, name: str = "") -> None:
        self.path, self.name = path, name or path.resolve().name
        file = path / FILE if path.is_dir() else path
        empty = path.is_dir() and not file.is_file() and not (path / "eval" / "results.json").is_file()
        self.numbers = [] if empty else read_results(file)
        self.latest = latest(self.numbers)
        models = self.json(f"eval/{MODELS}")
        self.exported: str = models.get("exported", STUDENT)
        """Weights of the student in the run's export: the last ones, or a selection's."""
        self.selections: list[str] = models.get("selections", [])
        """Names of other weights than the last ones."""

    def json(self, name: str) -> dict[str, Any]:
        return read_object(self.path / name, "result file") if (self.path / name).is_file() else {}

    @cached_property
    def train(self) -> list[dict[str, Any]]:
        """Train lines of metrics.jsonl, by step."""
        lines = json_lines(self.path / "metrics.jsonl", "metrics")
        by_step = {int(line["step"]): line for _, line in lines if line.get("kind") == "train"}
        return [by_step[step] for step in sorted(by_step)]

    def parameters(self, model: str) -> float | None:
        """In millions, where known; other weights of the student have its size."""
        sizes = {one.model: one.value for one in self.latest if one.metric == PARAMETERS}
        return sizes.get(model, None if model.startswith(TEACHER) else sizes.get(STUDENT))

    @cached_property
    def scores(self) -> dict[str, dict[Key, Number]]:
        """Model -> the last numbers that compare it with others."""
        return last_of(one for one in self.latest if one.dataset and not one.fitted)

    @cached_property
    def fitted(self) -> dict[str, list[Number]]:
        """Data set -> what was fitted on it for the exported weights."""
        found: dict[str, list[Number]] = {}
        for one in self.latest:
            if one.fitted and one.model == self.exported:
                found.setdefault(one.dataset, []).append(one)
        return found

    @cached_property
    def classified(self) -> dict[str, dict[str, Any]]:
        """Data set -> details of its classification by the exported weights."""
        details = self.json(f"eval/{DETAILS}").get(self.exported, {})
        return {name: one for name, one in details.items() if "confusion" in one}

    @property
    def command(self) -> str:
        path = self.path / "command.txt"
        return read_text(path, "command").strip() if path.is_file() else ""
