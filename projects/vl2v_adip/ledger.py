"""The query ledger: what a paid teacher was asked, what it answered and what it cost, in one sqlite file.

Every query has a key, sha256 over (teacher, kind, content, view), and a row, which is reserved against the budget before
the call and ends in one of four ways:

    answered   a valid vector; charged; never asked again, whoever asks
    rejected   an answer that cannot be right; charged; never asked again
    lost       sent, and no answer came (time-out, killed process); counted as charged, asked again only on demand
    failed     not served; not charged; asked again by the next call

So processes, restarts and copies of an image charge a key at most once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from projects.vl2v_adip.black_box import HttpTeacher, Kind
from vlmkd.config import AboveZero, Amount, Count, Positive
from vlmkd.errors import UserError
from vlmkd.files import new_folder
from vlmkd.service import AnswerLost, NotServed

_VERSION = 2
_LEASE = 900.0  # seconds until a reservation is lost, of whatever process
_POLL = 0.1  # seconds between looks at what another process is asking
_UNIT_SLACK = 1e-2  # of a norm that is declared to be 1
_END = "UPDATE queries SET status = ?, reason = ?, charged = charged + ?, vector = ?, vector_digest = ? WHERE key = ?"
_HINTS = {
    "failed": "start again when the teacher can be reached",
    "lost": "ask again by resend_lost=true, maybe charged twice",
    "rejected": "report the answer to the teacher's owner",
}
_TABLES = """
CREATE TABLE IF NOT EXISTS queries (
    key TEXT PRIMARY KEY, teacher TEXT NOT NULL, kind TEXT NOT NULL, alike TEXT NOT NULL, status TEXT NOT NULL,
    owner TEXT NOT NULL, until REAL NOT NULL, price REAL NOT NULL, charged INTEGER NOT NULL DEFAULT 0,
    reused INTEGER NOT NULL DEFAULT 0, vector BLOB, vector_digest TEXT, reason TEXT NOT NULL DEFAULT ''
);
CREATE INDEX IF NOT EXISTS by_vector ON queries (teacher, kind, vector_digest);
CREATE TABLE IF NOT EXISTS budgets (teacher TEXT PRIMARY KEY, max_queries INTEGER, max_cost REAL);
CREATE VIEW IF NOT EXISTS figures AS
SELECT *, max_queries - paid - under_way AS queries_left, max_cost - cost - reserved AS cost_left FROM (
    SELECT teacher, max_queries, max_cost, TOTAL(charged) AS paid, TOTAL(charged * price) AS cost,
        TOTAL(reused) AS reused, TOTAL(status = 'answered') AS answered, TOTAL(status = 'failed') AS failed,
        TOTAL(status = 'rejected') AS rejected, TOTAL(status = 'lost') AS lost,
        TOTAL(status = 'reserved') AS under_way, TOTAL((status = 'reserved') * price) AS reserved
    FROM budgets LEFT JOIN queries USING (teacher) GROUP BY teacher);
"""


def sha256(data: bytes) -> str:
    """Hexadecimal digest."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Query:
    """One thing to ask."""

    kind: Kind
    payload: bytes | str
    """What is sent: an encoded image, or a text."""
    content: str
    """What it stands for: a digest of the file or text, and the view of it."""
    alike: str
    """Queries with the same may rightly get the same vector: the pixels, or the text in lower case."""


def text_query(text: str) -> Query:
    """The query of a text."""
    return Query("text", text, sha256(text.encode()), " ".join(text.casefold().split()))


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Which teacher it is, and what it may cost."""

    ledger: str = ""
    """The ledger: an sqlite file on a disk of this machine; made when absent."""
    teacher_id: str = ""
    """Name and version of the teacher; another one has to be paid again."""
    dim: Count = 0
    """Width of its vectors."""
    unit_norm: bool = False
    """It declares unit vectors."""
    logit_scale: AboveZero = 100.0
    """Factor of its cosines in the softmax."""
    max_queries: Count | None = None
    """Budget in images and texts together; null: no limit."""
    max_cost: Amount | None = None
    """Budget in money; null: no limit."""
    price: Amount = 0.0
    """Cost of a query now."""
    batch_size: Positive = 32
    """Inputs of one call."""
    mask: bool = False
    """Leave out images that get no vector, instead of stopping."""
    resend_lost: bool = False
    """Ask again where an answer was lost; both charges count."""


class Ledger:
    """One teacher's part of a ledger file; also a TextEncoder."""

    def __init__(self, terms: Terms, teacher: HttpTeacher) -> None:
        self.path, self.name = Path(terms.ledger), terms.teacher_id
        self.dim, self.logit_scale = terms.dim, terms.logit_scale
        self.digest = sha256(f"black box {self.name}".encode())  # in the place of its weights'
        self._terms, self._teacher, self._base = terms, teacher, _open(self.path)
        budget = self.name, terms.max_queries, terms.max_cost
        self._base.execute("INSERT OR REPLACE INTO budgets VALUES (?, ?, ?)", budget)

    def require_budget(self, queries: Iterable[Query]) -> int:
        """How many of these would have to be asked; refused when the budget is too small for them."""
        new = sum(self._to_ask(self._row(key)) for key in {self._key(query) for query in queries})
        self._check_left(new, "nothing was asked; raise the budget or ask for less")
        return new

    def ask(self, queries: Sequence[Query]) -> list[Tensor | None]:
        """The teacher's vector [dim] in fp32 for each query, all of one kind; from the file or by asking.

        Raises:
            UserError: the budget is used up, or, without `mask`, a query got no vector; what was paid is kept.
        """
        keys = [self._key(query) for query in queries]
        waiting = dict(zip(keys, queries, strict=True))
        found: dict[str, Tensor | None] = {}
        asked: set[str] = set()
        alone: set[str] = set()  # of calls that were refused as a whole, for one of the inputs
        while waiting:
            mine = self._reserve(waiting, asked, alone, found)
            waiting = {key: query for key, query in waiting.items() if key not in found}
            if mine:
                refused = self._call(mine) and len(mine) > 1
                (alone if refused else asked).update(mine)
            elif waiting:
                time.sleep(_POLL)  # another process is asking
        counts = Counter(keys).items()
        reused = [(count - (key in asked), key) for key, count in counts if found[key] is not None]
        with self._transaction() as base:
            base.executemany("UPDATE queries SET reused = reused + ? WHERE key = ?", reused)
        return [found[key] for key in keys]

    def encode_text(self, texts: list[str]) -> Tensor:
        """N texts -> unit vectors [N, dim]; a failure always stops."""
        vectors = []
        for text, vector in zip(texts, self.ask([text_query(text) for text in texts]), strict=True):
            if vector is None:
                raise UserError(f"{self.name} gave no vector for the text {text!r}; see {self.path}'s report")
            vectors.append(vector)
        return F.normalize(torch.stack(vectors), dim=-1)

    def _reserve(
        self, waiting: dict[str, Query], asked: set[str], alone: set[str], found: dict[str, Tensor | None]
    ) -> dict[str, Query]:
        """Put into `found` what is settled; reserve the next call's queries."""
        mine: dict[str, Query] = {}
        now, terms, kept = time.time(), self._terms, f"what was paid is kept in {self.path}"
        with self._transaction() as base:
            base.execute(  # whether the teacher served them, nobody knows
                "UPDATE queries SET status = 'lost', charged = charged + 1, reason = 'the process ended during the call' "
                "WHERE status = 'reserved' AND (until < ? OR is_dead(owner))",
                (now,),
            )
            for key, query in waiting.items():
                row = self._row(key)
                if row is not None and row["status"] == "answered":
                    found[key] = torch.frombuffer(bytearray(row["vector"]), dtype=torch.float32)
                elif key not in asked and self._to_ask(row):
                    first = next(iter(mine), key)
                    if key == first or (len(mine) < terms.batch_size and not {first, key} & alone):
                        mine[key] = query
                elif row is not None and row["status"] != "reserved":
                    found[key] = None
                    if not terms.mask:
                        raise UserError(
                            f"{self.name} gave no vector for a query ({row['status']}: {row['reason']}); {kept}; "
                            f"{_HINTS[row['status']]}, or leave it out by mask=true"
                        )
            self._check_left(len(mine), f"{kept}; raise the budget and start again")
            own = (f"{socket.gethostname()}:{os.getpid()}", now + _LEASE, terms.price)
            base.executemany(
                "INSERT INTO queries (key, teacher, kind, alike, status, owner, until, price) "
                "VALUES (?, ?, ?, ?, 'reserved', ?, ?, ?) ON CONFLICT (key) DO UPDATE "
                "SET status = 'reserved', owner = excluded.owner, until = excluded.until, price = excluded.price",
                [(key, self.name, query.kind, query.alike, *own) for key, query in mine.items()],
            )
        return mine

    def _call(self, mine: dict[str, Query]) -> bool:
        """Ask for reserved queries and write down what came; True: they were refused."""
        kind = next(iter(mine.values())).kind
        try:
            vectors = self._teacher.embed(kind, [query.payload for query in mine.values()])
        except BaseException as error:
            # Whatever broke the call off (a signal, too) may have come after it was sent.
            free = isinstance(error, NotServed | UserError)
            told = str(error) if free or isinstance(error, AnswerLost) else "the call was broken off"
            with self._transaction() as base:
                end = ("failed" if free else "lost", told, not free, None, None)
                base.executemany(_END, [(*end, key) for key in mine])
            if isinstance(error, NotServed | AnswerLost):
                return isinstance(error, NotServed) and error.refused
            raise
        with self._transaction() as base:
            for (key, query), values in zip(mine.items(), vectors, strict=True):
                data, reason = self._checked(values)
                digest = sha256(data)
                same = "teacher = ? AND kind = ? AND vector_digest = ? AND alike != ? AND status = 'answered'"
                facts = (self.name, kind, digest, query.alike)
                if not reason and base.execute(f"SELECT 1 FROM queries WHERE {same}", facts).fetchone():
                    reason = f"it is the vector of another {kind}"
                end = ("rejected", reason, 1, None, digest) if reason else ("answered", "", 1, data, digest)
                base.execute(_END, (*end, key))
        return False

    def _checked(self, values: list[float]) -> tuple[bytes, str]:
        """The vector in fp32, and what is wrong with it, if anything."""
        try:
            vector = torch.tensor(values, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            return b"", "it is no list of numbers"
        norm = float(vector.double().norm())
        long = self._terms.unit_norm and abs(norm - 1) > _UNIT_SLACK
        faults = {
            f"its shape is {list(vector.shape)}, not [{self.dim}]": vector.shape != (self.dim,),
            "it is not finite": not math.isfinite(norm),
            "it is zero": norm == 0,
            f"its length is {norm:.4f}, but unit vectors are declared": long,
        }
        return vector.numpy().tobytes(), next((reason for reason in faults if faults[reason]), "")

    def _check_left(self, number: int, hint: str) -> None:
        wanted = "IFNULL(queries_left, 9e999), IFNULL(cost_left, 9e999)"
        row = self._base.execute(f"SELECT {wanted} FROM figures WHERE teacher = ?", (self.name,)).fetchone()
        (queries, cost), price = row, number * self._terms.price
        if number > queries or price > cost + 1e-9:
            raise UserError(
                f"{number} more queries to {self.name} are needed, which cost {price:g}; {queries:g} queries and a cost of "
                f"{cost:g} are left of the budget; {hint}"
            )

    def _key(self, query: Query) -> str:
        return sha256(json.dumps([self.name, query.kind, query.content]).encode())

    def _row(self, key: str) -> sqlite3.Row | None:
        return self._base.execute("SELECT * FROM queries WHERE key = ?", (key,)).fetchone()

    def _to_ask(self, row: sqlite3.Row | None) -> bool:
        again = ("failed", "lost") if self._terms.resend_lost else ("failed",)
        return row is None or row["status"] in again

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._base as base:
            base.execute("BEGIN IMMEDIATE")
            yield base


def report(path: str | Path) -> list[dict[str, Any]]:
    """The figures of every teacher in a ledger file; None: no limit."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"ledger {path} does not exist")
    with closing(_open(path)) as base:
        return [dict(row) for row in base.execute("SELECT * FROM figures ORDER BY teacher")]


def _is_dead(owner: str) -> bool:
    """Whether it was a process here that has ended."""
    host, _, process = owner.rpartition(":")
    return host == socket.gethostname() and not psutil.pid_exists(int(process))


def _open(path: Path) -> sqlite3.Connection:
    new_folder(path.parent, "ledger")
    try:
        base = sqlite3.connect(path, timeout=60, isolation_level=None)
        base.row_factory = sqlite3.Row
        base.create_function("is_dead", 1, _is_dead)
        base.execute("PRAGMA synchronous = EXTRA")  # a reservation must outlive a power cut after the call
        version = base.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, _VERSION):
            raise UserError(f"ledger {path} has version {version}, this code reads {_VERSION}; name another")
        base.executescript(f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version = {_VERSION}; COMMIT;")
    except sqlite3.DatabaseError as error:
        told = "cannot be opened" if isinstance(error, sqlite3.OperationalError) else "is no query ledger"
        raise UserError(f"ledger {path} {told} ({error}); name another file") from None
    return base
