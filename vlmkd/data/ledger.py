"""The query ledger: what a black-box teacher was asked, what it answered and what was paid, in one sqlite file.

Every query has a key, sha256 over (teacher, preprocessing, kind, content, view), and a row. A row is reserved against
the budget before the call and ends in one of four ways:

    answered   a valid vector; charged; never asked again, whoever asks
    rejected   an answer that cannot be right; charged; never asked again
    lost       sent, and no answer came (time-out, killed process); counted as charged, not asked again unless the policy says so
    failed     not served; not charged; asked again

So a key is charged at most once, by any number of processes on this file, by restarts, and for copies of an image.
The file is in WAL mode and must lie on a disk of this machine.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import socket
import sqlite3
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlmkd.data.labelled import Item
from vlmkd.data.samples import BadSample
from vlmkd.data.stored_outputs import CLEAN, Prepared, missing_items, prepare, write_parts
from vlmkd.data.teacher_cache import CacheInfo
from vlmkd.data.transforms import View, ViewConfig
from vlmkd.errors import UserError
from vlmkd.files import new_folder
from vlmkd.image_spec import ImageSpec
from vlmkd.query import AnswerLost, BlackBox, NotServed

Kind = Literal["image", "text"]

_VERSION = 1
_LEASE = 900.0  # seconds after which a reservation of a process that cannot be asked for its health is lost
_POLL = 0.1  # seconds between looks at a query that another process is asking
_UNIT_SLACK = 1e-2  # of a norm that is declared to be 1

_MENDS = {
    "failed": "start again when the teacher can be reached",
    "lost": "ask again by the policy resend_lost, which may be charged twice",
    "rejected": "report the answer to the teacher's owner",
}

_TABLES = """
CREATE TABLE IF NOT EXISTS queries (
    key TEXT PRIMARY KEY, teacher TEXT NOT NULL, kind TEXT NOT NULL, preprocessing TEXT NOT NULL, content TEXT NOT NULL,
    view TEXT NOT NULL, alike TEXT NOT NULL, status TEXT NOT NULL, calls INTEGER NOT NULL, charged INTEGER NOT NULL,
    cost REAL NOT NULL, price REAL NOT NULL, reused INTEGER NOT NULL, vector BLOB, vector_digest TEXT, reason TEXT NOT NULL,
    owner TEXT NOT NULL, until REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS by_vector ON queries (teacher, kind, vector_digest);
CREATE TABLE IF NOT EXISTS budgets (teacher TEXT PRIMARY KEY, max_queries INTEGER, max_cost REAL);
"""


@dataclass(frozen=True)
class Budget:
    """What a teacher may cost in all; None: no limit."""

    max_queries: int | None = None
    max_cost: float | None = None


@dataclass(frozen=True)
class Prices:
    """Cost of one query."""

    image: float = 0.0
    text: float = 0.0


@dataclass(frozen=True)
class Policy:
    """What happens when a query gets no vector that can be used."""

    retries: int = 2
    """Further calls for a query that was not served, per run."""
    failed: Literal["mask", "abort"] = "abort"
    """Then: leave the vector out, or stop."""
    resend_lost: bool = False
    """Ask again where the answer was lost; the teacher may then have charged twice, and the ledger counts both."""


@dataclass(frozen=True)
class Query:
    """One thing to ask."""

    kind: Kind
    content: str
    """sha256 of the file, or of the text."""
    payload: bytes | str
    """What is sent."""
    preprocessing: str = "as it is"
    """How the payload was made of the content."""
    view: str = ""
    """The view's parameters; empty for the whole."""
    alike: str = ""
    """What queries have in common that may rightly get the same vector: the pixels, or the text in lower case."""


def text_query(text: str) -> Query:
    """The query of a text."""
    return Query("text", _sha(text.encode()), text, alike=" ".join(text.casefold().split()))


def image_queries(prepared: Prepared, info: CacheInfo) -> list[Query]:
    """The queries of an image: its file as it is where `info` asks for clean views, else a PNG of each view."""
    content = _sha(prepared.image)
    alike = [_sha(pixels.contiguous().numpy().tobytes()) for pixels in prepared.pixels]
    if info.views == CLEAN:
        return [Query("image", content, prepared.image, alike=alike[0])]
    spec = info.image_spec
    made = f"png {spec.size[0]}x{spec.size[1]} {spec.interpolation} on {spec.fill}"
    return [
        Query("image", content, _png(pixels), made, _view_text(view), same)
        for view, pixels, same in zip(prepared.views, prepared.pixels, alike, strict=True)
    ]


def _view_text(view: View) -> str:
    return json.dumps(astuple(view))


def _png(pixels: Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(file, "PNG")
    return file.getvalue()


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --------------------------------------------------------------------------------------------------------- ledger


class Ledger:
    """One teacher's part of a ledger file; also the text side of a DualEncoder, for class vectors.

    Args:
        path: the sqlite file; made when absent.
        teacher: what is asked; None where every answer must be in the file already.
        teacher_id: the teacher's name and version, which every key depends on.
        dim: width of its vectors.
        unit_norm: whether it declares unit vectors.
        logit_scale: factor of its cosines in the softmax; 100 is that of OpenAI's models.
        batch_size: inputs of one call.

    Raises:
        UserError: the file is no ledger, or one of another version.
    """

    def __init__(
        self,
        path: str | Path,
        teacher: BlackBox | None,
        teacher_id: str,
        *,
        dim: int,
        unit_norm: bool = False,
        logit_scale: float = 100.0,
        budget: Budget | None = None,
        prices: Prices | None = None,
        policy: Policy | None = None,
        batch_size: int = 32,
    ) -> None:
        self.name, self.dim, self.logit_scale = teacher_id, dim, logit_scale
        self.path, self.policy = Path(path), policy or Policy()
        self._teacher, self._unit_norm, self._batch_size = teacher, unit_norm, batch_size
        self._budget, self._prices = budget or Budget(), prices or Prices()
        self._owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex}"
        self._base = _open(self.path)
        if teacher is not None:
            with self._change() as base:
                base.execute(
                    "INSERT OR REPLACE INTO budgets VALUES (?, ?, ?)", (teacher_id, *astuple(self._budget))
                )

    def close(self) -> None:
        """Close the file."""
        self._base.close()

    def key(self, query: Query) -> str:
        """sha256 over teacher, preprocessing, kind, content and view."""
        return _sha(
            json.dumps([self.name, query.preprocessing, query.kind, query.content, query.view]).encode()
        )

    @property
    def digest(self) -> str:
        """What stands for the digest of the teacher's weights, which nobody here has."""
        return _sha(f"black box {self.name}".encode())

    def require_budget(self, queries: Iterable[Query]) -> int:
        """How many of these would have to be asked; called with all that a run needs, before its first query.

        Raises:
            UserError: they are more, or cost more, than what is left.
        """
        new: dict[str, Kind] = {}
        for query in queries:
            key = self.key(query)
            if key not in new and self._to_ask(self._row(key)):
                new[key] = query.kind
        cost = sum(self._price(kind) for kind in new.values())
        queries_left, cost_left = self._left()
        if len(new) > queries_left:
            raise UserError(
                f"{len(new)} queries to {self.name} are needed, {queries_left:.0f} are left of the budget of "
                f"{self._budget.max_queries}; nothing was asked; raise the budget or ask for less"
            )
        if cost > cost_left + 1e-9:
            raise UserError(
                f"{len(new)} queries to {self.name} would cost {cost:g}, {cost_left:g} is left of the budget of "
                f"{self._budget.max_cost:g}; nothing was asked; raise the budget or ask for less"
            )
        return len(new)

    def ask(self, queries: Sequence[Query]) -> list[Tensor | None]:
        """The teacher's vector [dim] for each query, in fp32 as it came, from the file or by asking.

        None where it gave none that can be used and the policy is `mask`.

        Raises:
            UserError: the budget is used up, or a query failed and the policy is `abort`; what was paid is kept.
        """
        wanted = {self.key(query): query for query in queries}
        found: dict[str, Tensor | None] = {}
        asked: Counter[str] = Counter()
        alone: set[str] = set()  # of calls that were refused as a whole: one of the inputs is to blame
        refused: set[str] = set()
        while wanted.keys() - found.keys():
            open_ones = {key: query for key, query in wanted.items() if key not in found}
            mine, others = self._reserve(open_ones, found, asked, alone, refused)
            if mine:
                asked.update(mine.keys())
                if not self._call(mine):
                    continue
                if len(mine) > 1:
                    alone |= mine.keys()
                    asked.subtract(mine.keys())
                else:
                    refused |= mine.keys()
            elif others:
                time.sleep(_POLL)
        with self._change() as base:
            for key, count in Counter(self.key(query) for query in queries).items():
                reused = count - bool(asked[key])
                if reused and found[key] is not None:
                    base.execute("UPDATE queries SET reused = reused + ? WHERE key = ?", (reused, key))
        return [found[self.key(query)] for query in queries]

    def encode_text(self, texts: list[str]) -> Tensor:
        """N texts -> unit vectors [N, dim]; without one of them there is no classifier, so a failure always stops.

        Raises:
            UserError: as `ask`, or a text has no vector.
        """
        vectors = self.ask([text_query(text) for text in texts])
        lacking = [text for text, vector in zip(texts, vectors, strict=True) if vector is None]
        if lacking:
            raise UserError(
                f"{self.name} gave no vector for the text {lacking[0]!r}; see the report of {self.path}"
            )
        return F.normalize(torch.stack([vector for vector in vectors if vector is not None]), dim=-1)

    # ------------------------------------------------------------------------------------------------- one call

    def _reserve(
        self,
        wanted: dict[str, Query],
        found: dict[str, Tensor | None],
        asked: Counter[str],
        alone: set[str],
        refused: set[str],
    ) -> tuple[dict[str, Query], bool]:
        """Put into `found` what is settled; reserve the next call's queries. True: others are being asked elsewhere."""
        mine: dict[str, Query] = {}
        elsewhere = False
        with self._change() as base:
            self._give_up_dead(base)
            for key, query in wanted.items():
                row = self._row(key)
                again = asked[key] <= self.policy.retries and key not in refused
                if row is not None and row["status"] == "answered":
                    found[key] = torch.frombuffer(bytearray(row["vector"]), dtype=torch.float32)
                elif row is not None and row["status"] == "reserved":
                    elsewhere = True
                elif self._to_ask(row) and again:
                    first = next(iter(mine), key)
                    room = len(mine) < (1 if first in alone else self._batch_size)
                    if not mine or (room and key not in alone and query.kind == wanted[first].kind):
                        mine[key] = query
                else:
                    found[key] = None
                    if self.policy.failed == "abort":
                        assert row is not None
                        raise UserError(
                            f"{self.name} gave no vector for a query ({row['status']}: {row['reason']}); what was paid "
                            f"is kept in {self.path}; {_MENDS[row['status']]}, or leave it out by the policy mask"
                        )
            self._check_left(mine)
            if mine and self._teacher is None:
                raise UserError(
                    f"{self.path} lacks {len(mine)} answers of {self.name}, and there is nobody to ask"
                )
            for key, query in mine.items():
                self._write_reservation(base, key, query)
        return mine, elsewhere

    def _to_ask(self, row: sqlite3.Row | None) -> bool:
        if row is None or row["status"] == "failed":
            return True
        return row["status"] == "lost" and self.policy.resend_lost

    def _check_left(self, mine: dict[str, Query]) -> None:
        queries_left, cost_left = self._left()
        cost = sum(self._price(query.kind) for query in mine.values())
        if len(mine) > queries_left or cost > cost_left + 1e-9:
            raise UserError(
                f"the budget of {self.name} is used up: {len(mine)} more queries at {cost:g} in all, "
                f"{queries_left:.0f} and {cost_left:g} left; what was paid is kept in {self.path}; raise the budget "
                f"and start again"
            )

    def _write_reservation(self, base: sqlite3.Connection, key: str, query: Query) -> None:
        base.execute(
            "INSERT OR IGNORE INTO queries VALUES (?, ?, ?, ?, ?, ?, ?, 'failed', 0, 0, 0, 0, 0, NULL, NULL, '', '', 0)",
            (key, self.name, query.kind, query.preprocessing, query.content, query.view, query.alike),
        )
        base.execute(
            "UPDATE queries SET status = 'reserved', calls = calls + 1, price = ?, owner = ?, until = ? WHERE key = ?",
            (self._price(query.kind), self._owner, time.time() + _LEASE, key),
        )

    def _call(self, mine: dict[str, Query]) -> bool:
        """Ask for reserved queries of one kind and write down what came; True: the call was refused."""
        assert self._teacher is not None
        payloads = [query.payload for query in mine.values()]
        try:
            if next(iter(mine.values())).kind == "image":
                vectors = self._teacher.embed_images([part for part in payloads if isinstance(part, bytes)])
            else:
                vectors = self._teacher.embed_texts([part for part in payloads if isinstance(part, str)])
        except NotServed as failure:
            self._settle(mine, "failed", str(failure))
            return failure.refused
        except AnswerLost as failure:
            self._settle(mine, "lost", str(failure))
            return False
        except UserError as error:
            self._settle(mine, "failed", str(error))
            raise
        except BaseException:
            self._settle(mine, "lost", "the call was broken off")
            raise
        if len(vectors) != len(mine):
            self._settle(mine, "lost", f"{len(vectors)} vectors for {len(mine)} inputs")
            return False
        with self._change() as base:
            for (key, query), values in zip(mine.items(), vectors, strict=True):
                self._write_answer(base, key, query, values)
        return False

    def _write_answer(self, base: sqlite3.Connection, key: str, query: Query, values: list[float]) -> None:
        vector, reason = self._checked(values)
        data = b"" if vector is None else vector.numpy().tobytes()
        if not reason:
            same = base.execute(
                "SELECT content FROM queries WHERE teacher = ? AND kind = ? AND vector_digest = ? AND content != ? "
                "AND alike != ? AND status = 'answered'",
                (self.name, query.kind, _sha(data), query.content, query.alike),
            ).fetchone()
            reason = f"it is the vector of another {query.kind}, {same['content'][:12]}..." if same else ""
        base.execute(
            "UPDATE queries SET status = ?, reason = ?, vector = ?, vector_digest = ?, charged = charged + 1, "
            "cost = cost + price WHERE key = ?",
            ("rejected" if reason else "answered", reason, None if reason else data, _sha(data), key),
        )

    def _checked(self, values: list[float]) -> tuple[Tensor | None, str]:
        """The vector in fp32, and what is wrong with it, if anything."""
        try:
            vector = torch.tensor(values, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            return None, "it is no list of numbers"
        if vector.shape != (self.dim,):
            return None, f"its shape is {list(vector.shape)}, not [{self.dim}]"
        if not vector.isfinite().all():
            return None, "it is not finite"
        norm = float(vector.double().norm())
        if norm == 0:
            return None, "it is zero"
        if self._unit_norm and abs(norm - 1) > _UNIT_SLACK:
            return None, f"its length is {norm:.4f}, but unit vectors are declared"
        return vector, ""

    def _settle(self, mine: dict[str, Query], status: Literal["failed", "lost"], reason: str) -> None:
        with self._change() as base:
            for key in mine:
                _end_without_answer(base, key, status, reason)

    def _give_up_dead(self, base: sqlite3.Connection) -> None:
        """Reservations of processes that are no more: whether the teacher served them, nobody knows."""
        rows = base.execute("SELECT key, owner, until FROM queries WHERE status = 'reserved'").fetchall()
        for row in rows:
            if row["until"] < time.time() or _is_dead(row["owner"]):
                _end_without_answer(base, row["key"], "lost", "the process ended during the call")

    # ----------------------------------------------------------------------------------------------- the figures

    def _price(self, kind: Kind) -> float:
        return self._prices.image if kind == "image" else self._prices.text

    def _left(self) -> tuple[float, float]:
        """Queries and cost left of the budget; infinity without a limit."""
        row = self._base.execute(
            "SELECT SUM(charged + (status = 'reserved')) AS queries, SUM(cost + price * (status = 'reserved')) AS cost "
            "FROM queries WHERE teacher = ?",
            (self.name,),
        ).fetchone()
        limits = (self._budget.max_queries, self._budget.max_cost)
        spent = (row["queries"] or 0, row["cost"] or 0.0)
        left = [
            math.inf if limit is None else limit - used for limit, used in zip(limits, spent, strict=True)
        ]
        return left[0], left[1]

    def _row(self, key: str) -> sqlite3.Row | None:
        return self._base.execute("SELECT * FROM queries WHERE key = ?", (key,)).fetchone()

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """A transaction that no other process writes in."""
        self._base.execute("BEGIN IMMEDIATE")
        try:
            yield self._base
        except BaseException:
            self._base.execute("ROLLBACK")
            raise
        self._base.execute("COMMIT")


def _end_without_answer(
    base: sqlite3.Connection, key: str, status: Literal["failed", "lost"], reason: str
) -> None:
    charged = int(status == "lost")
    base.execute(
        "UPDATE queries SET status = ?, reason = ?, charged = charged + ?, cost = cost + price * ? WHERE key = ?",
        (status, reason, charged, charged, key),
    )


def _is_dead(owner: str) -> bool:
    """Whether the owner was a process of this machine that has ended."""
    host, pid, _ = owner.rsplit(":", 2)
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False  # it lives, and is another user's
    return False


def _open(path: Path) -> sqlite3.Connection:
    new_folder(path.parent, "--ledger")
    try:
        base = sqlite3.connect(path, timeout=60, isolation_level=None)
    except sqlite3.OperationalError as error:
        raise UserError(
            f"--ledger {path} cannot be opened ({error}); name a file that can be written"
        ) from None
    base.row_factory = sqlite3.Row
    try:
        _enter_wal(base)
        base.execute(
            "PRAGMA synchronous = FULL"
        )  # a reservation must outlive a power cut that follows the call
        version = base.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, _VERSION):
            raise UserError(
                f"ledger {path} has version {version}, this code reads {_VERSION}; name another file"
            )
        base.executescript(_TABLES)
        base.execute(f"PRAGMA user_version = {_VERSION}")
    except sqlite3.DatabaseError as error:
        base.close()
        raise UserError(f"{path} is no query ledger ({error}); name another file") from None
    return base


def _enter_wal(base: sqlite3.Connection) -> None:
    """WAL mode; sqlite does not wait by itself when another process switches a new file at the same moment."""
    for _ in range(100):
        try:
            base.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise
            time.sleep(_POLL)
    raise UserError("the ledger is locked by another process; wait for it, or end it")


# ------------------------------------------------------------------------------------------------ sets and reports


def embed_queried(
    ledger: Ledger,
    items: Sequence[Item],
    folder: str | Path,
    *,
    name: str,
    image_spec: ImageSpec,
    views: ViewConfig = CLEAN,
    view_count: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    part_size: int = 2000,
    max_pixels: int = 89_478_485,
    workers: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> Counter[str]:
    """As `stored_outputs.embed_items`, with a black-box teacher: writes the same files, so that training asks nothing.

    Every image is decoded before the first query, and the whole number of queries is compared with the budget. A view
    that got no usable vector is stored as zeros. Returns the images left out, and `masked_view`, by reason.

    Args:
        views: CLEAN sends the files as they are, one query an image; others send a PNG of each view.
        image_spec: size, interpolation and fill of the views that are sent.

    Raises:
        UserError: the budget is smaller than what is needed, or as `Ledger.ask` and `embed_items` do.
    """
    info = CacheInfo(
        source=ledger.name, digest=ledger.digest, logit_scale=ledger.logit_scale, dim=ledger.dim, crops=view_count,
        seed=seed, image_spec=image_spec, views=views, set_name=name, dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip
    todo = missing_items(items, Path(folder))
    ready = (one for one in prepare(todo, info, max_pixels, workers) if not isinstance(one, BadSample))
    ledger.require_budget(query for one in ready for query in image_queries(one, info))
    masked = 0

    def embed(batch: list[Prepared]) -> Tensor:
        nonlocal masked
        vectors = ledger.ask([query for one in batch for query in image_queries(one, info)])
        masked += sum(vector is None for vector in vectors)
        rows = [torch.zeros(ledger.dim) if vector is None else vector for vector in vectors]
        return F.normalize(torch.stack(rows), dim=-1)

    skipped = write_parts(
        embed, items, folder, info, 32, part_size=part_size, max_pixels=max_pixels, workers=workers,
        progress=progress,
    )  # fmt: skip
    if masked:
        skipped["masked_view"] = masked
    return skipped


@dataclass(frozen=True)
class Report:
    """One teacher's figures."""

    teacher: str
    paid: int
    """Queries charged, or counted as charged."""
    cost: float
    answered: int
    reused: int
    """Times that an answer was taken from the file."""
    failed: int
    rejected: int
    lost: int
    under_way: int
    queries_left: int | None
    cost_left: float | None


def report(path: str | Path) -> list[Report]:
    """The figures of every teacher in a ledger file.

    Raises:
        UserError: no such file, or no ledger.
    """
    if not Path(path).is_file():
        raise UserError(f"ledger {path} does not exist")
    with closing(_open(Path(path))) as base:
        rows = base.execute(
            "SELECT budgets.teacher, max_queries, max_cost, COALESCE(SUM(charged), 0) AS paid, "
            "COALESCE(SUM(cost), 0.0) AS cost, COALESCE(SUM(reused), 0) AS reused, "
            "COALESCE(SUM(status = 'answered'), 0) AS answered, COALESCE(SUM(status = 'failed'), 0) AS failed, "
            "COALESCE(SUM(status = 'rejected'), 0) AS rejected, COALESCE(SUM(status = 'lost'), 0) AS lost, "
            "COALESCE(SUM(status = 'reserved'), 0) AS under_way, "
            "COALESCE(SUM(price * (status = 'reserved')), 0.0) AS reserved_cost "
            "FROM budgets LEFT JOIN queries USING (teacher) GROUP BY budgets.teacher ORDER BY budgets.teacher"
        ).fetchall()
    return [
        Report(
            row["teacher"], row["paid"], row["cost"], row["answered"], row["reused"], row["failed"],
            row["rejected"], row["lost"], row["under_way"],
            None if row["max_queries"] is None else row["max_queries"] - row["paid"] - row["under_way"],
            None if row["max_cost"] is None else row["max_cost"] - row["cost"] - row["reserved_cost"],
        )
        for row in rows
    ]  # fmt: skip
