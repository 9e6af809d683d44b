"""The query ledger: nothing is paid twice, the budget holds, bad answers are found, failures follow the policy."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import socket
import sqlite3
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from projects.vl2v_adip.black_box import HttpTeacher
from projects.vl2v_adip.ledger import Ledger, Query, Terms, report, text_query
from vlmkd.errors import UserError
from vlmkd.service import AnswerLost, NotServed, Service

DIM = 6


def vector(data: bytes) -> list[float]:
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(data).digest()[:4], "big"))
    return F.normalize(torch.randn(DIM, generator=generator), dim=0).tolist()


class Teacher:
    """Pseudo-random unit vectors of the bytes; `script` holds exceptions or answers to give first."""

    def __init__(self, script=(), refuses=()):
        self.calls, self.script, self.refuses = [], list(script), set(refuses)

    def embed(self, kind, inputs):
        images = [part.encode() for part in inputs] if kind == "text" else inputs
        self.calls.append(list(images))
        if self.refuses & set(images):
            raise NotServed("unprocessable", refused=True)
        if self.script:
            answer = self.script.pop(0)
            if isinstance(answer, BaseException):
                raise answer
            return answer
        return [vector(image) for image in images]

    @property
    def paid(self):
        return [part for call in self.calls for part in call]


def image(name: str) -> Query:
    data = name.encode()
    return Query("image", data, hashlib.sha256(data).hexdigest(), alike=name)


def ledger(path, teacher, **terms):
    fixed = {"ledger": str(path), "teacher_id": "vendor-1", "dim": DIM, "unit_norm": True}
    return Ledger(Terms(**{**fixed, **terms}), teacher)


def figures(path):
    (part,) = report(path)
    return SimpleNamespace(**part)


def test_answers_are_kept_and_never_asked_again(tmp_path):
    path, teacher = tmp_path / "ledger.sqlite", Teacher()
    names = ["a", "b", "a", "c"]
    first = ledger(path, teacher, batch_size=2, price=0.5).ask([image(name) for name in names])
    assert teacher.calls == [[b"a", b"b"], [b"c"]]
    for name, found in zip(names, first, strict=True):
        torch.testing.assert_close(found, torch.tensor(vector(name.encode())), rtol=0, atol=0)
    idle = Teacher()
    again = ledger(path, idle).ask([image("c"), image("a")])
    assert not idle.calls and torch.equal(again[0], first[3]) and torch.equal(again[1], first[0])
    part = figures(path)
    assert (part.paid, part.cost, part.answered, part.reused) == (3, 1.5, 3, 3)
    other = ledger(path, teacher, teacher_id="vendor-2")  # another teacher is another key
    other.ask([image("a")])
    assert teacher.paid.count(b"a") == 2
    assert [part["teacher"] for part in report(path)] == ["vendor-1", "vendor-2"]


def test_the_budget_is_checked_before_the_call_and_survives_restarts(tmp_path):
    path, teacher = tmp_path / "ledger.sqlite", Teacher()
    ledger(path, teacher, max_queries=3, batch_size=2).ask([image("a"), image("b")])
    again = ledger(path, teacher, max_queries=3, batch_size=2)
    with pytest.raises(
        UserError, match="2 more queries to vendor-1 are needed.* 1 queries and a cost of inf are left"
    ):
        again.ask([image("c"), image("d")])
    assert len(teacher.paid) == 2
    again.ask([image("c")])
    assert figures(path).queries_left == 0
    with pytest.raises(UserError, match="1 more queries .*raise the budget and start again"):
        again.ask([image("d")])
    raised = ledger(path, teacher, max_cost=1.0, price=0.4)
    raised.ask([image("d"), image("e")])
    with pytest.raises(UserError, match="1 more queries .*raise the budget and start again"):
        raised.ask([image("f")])
    assert figures(path).cost_left == pytest.approx(0.2)


def test_a_run_that_needs_more_than_the_budget_is_refused_before_its_first_query(tmp_path):
    path, teacher = tmp_path / "ledger.sqlite", Teacher()
    small = ledger(path, teacher, max_queries=4, price=0.1)
    queries = [image(name) for name in "abcdeabc"]
    with pytest.raises(
        UserError,
        match="5 more queries to vendor-1 are needed.* 4 queries and .* are left .* nothing was asked",
    ):
        small.require_budget(queries)
    small.ask(queries[:2])
    with pytest.raises(UserError, match="3 more queries to vendor-1 are needed.* 2 queries "):
        small.require_budget(queries)
    assert small.require_budget(queries[:4]) == 2
    dear = ledger(path, teacher, max_cost=0.35, price=0.1)
    with pytest.raises(UserError, match="which cost 0.3; .* a cost of 0.15 are left"):
        dear.require_budget(queries)
    assert len(teacher.paid) == 2


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ([1.0, 0.0], "its shape is .2., not .6."),
        ([float("nan")] + [0.0] * 5, "it is not finite"),
        ([0.0] * 6, "it is zero"),
        ([1.02] + [0.0] * 5, "its length is 1.0200"),
        (["x"] * 6, "it is no list of numbers"),
        (None, "it is no list of numbers"),
    ],
)
def test_answers_that_cannot_be_right_are_paid_once_and_not_used(tmp_path, answer, reason):
    path, teacher = tmp_path / "ledger.sqlite", Teacher([[answer]])
    with pytest.raises(UserError, match=f"gave no vector for a query .rejected: {reason}"):
        ledger(path, teacher).ask([image("a")])
    assert ledger(path, teacher, mask=True).ask([image("a"), image("b")])[0] is None
    assert teacher.paid == [b"a", b"b"]
    part = figures(path)
    assert (part.rejected, part.paid, part.answered) == (1, 2, 1)


def test_slightly_long_unit_vectors_pass(tmp_path):
    teacher = Teacher([[[1.009] + [0.0] * 5]])
    assert ledger(tmp_path / "l", teacher).ask([image("a")])[0] is not None


def test_the_vector_of_another_content_is_not_taken(tmp_path):
    same = [1.0] + [0.0] * 5
    teacher = Teacher([[same, same], [same]])
    found = ledger(tmp_path / "l", teacher, mask=True).ask([image("a"), image("b")])
    assert found[0] is not None and found[1] is None
    twin = Query("image", b"a'", hashlib.sha256(b"a'").hexdigest(), "a")  # another file of the same pixels
    assert ledger(tmp_path / "l", teacher).ask([twin])[0] is not None


def test_queries_that_were_not_served_are_not_charged_and_asked_again_by_the_next_call(tmp_path):
    path, teacher = tmp_path / "l", Teacher([NotServed("busy")])
    with pytest.raises(UserError, match="gave no vector for a query .failed: busy.*start again when"):
        ledger(path, teacher).ask([image("a")])
    assert len(teacher.calls) == 1 and figures(path).failed == 1 and figures(path).paid == 0
    assert ledger(path, teacher).ask([image("a")])[0] is not None and figures(path).paid == 1


def test_calls_that_never_left_this_machine_cost_nothing_and_leave_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("BOX_TOKEN", "sk-SECRET")
    path = tmp_path / "ledger"
    with socket.socket() as unused:  # held, so that nobody else listens there
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        address = f"http://127.0.0.1:{port}/?key=sk-SECRET"
        teacher = HttpTeacher(Service(url=address, token_env="BOX_TOKEN", retries=0))
        with pytest.raises(UserError, match=f"http://127.0.0.1:{port}/ cannot be reached") as failure:
            ledger(path, teacher).ask([image("a"), image("b")])
    assert figures(path).paid == 0 and figures(path).failed == 2 and "SECRET" not in str(failure.value)
    assert all(b"SECRET" not in file.read_bytes() for file in tmp_path.iterdir())


def test_lost_answers_count_as_paid_and_are_asked_again_only_on_demand(tmp_path):
    path, teacher = tmp_path / "l", Teacher([AnswerLost("timed out")])
    with pytest.raises(UserError, match="lost: timed out"):
        ledger(path, teacher).ask([image("a")])
    with pytest.raises(UserError, match="lost: timed out"):
        ledger(path, teacher).ask([image("a")])
    assert len(teacher.calls) == 1 and figures(path).paid == 1 and figures(path).lost == 1
    assert ledger(path, teacher, resend_lost=True).ask([image("a")])[0] is not None
    assert figures(path).paid == 2  # honest about the second charge


def test_one_refused_input_does_not_spoil_its_call(tmp_path):
    path, teacher = tmp_path / "l", Teacher(refuses=[b"b"])
    found = ledger(path, teacher, mask=True).ask([image(name) for name in "abc"])
    assert [part is not None for part in found] == [True, False, True]
    assert [call for call in teacher.calls if b"b" in call] == [[b"a", b"b", b"c"], [b"b"]]
    assert figures(path).paid == 2


def test_a_call_that_is_broken_off_is_lost(tmp_path):
    path, teacher = tmp_path / "l", Teacher([KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        ledger(path, teacher).ask([image("a")])
    assert figures(path).lost == 1
    teacher.script = [UserError("no such address")]
    with pytest.raises(UserError, match="no such address"):
        ledger(path, teacher).ask([image("b")])
    assert figures(path).failed == 1 and figures(path).under_way == 0


class _Killer:
    def embed(self, kind, images):
        os._exit(9)


def _die(path):
    ledger(path, _Killer()).ask([image("a")])


class _SlowFile:
    """Writes every query to a file, so that two processes' calls can be counted."""

    def __init__(self, path):
        self.path = path

    def embed(self, kind, images):
        import time

        with open(self.path, "a") as file:
            file.writelines(part.decode() + "\n" for part in images)
        time.sleep(0.05)
        return [vector(part) for part in images]


def _ask_all(path, log, offset, results):
    names = [f"x{(offset + n) % 12}" for n in range(12)]
    found = ledger(path, _SlowFile(log), batch_size=3).ask([image(name) for name in names])
    results.put({name: value.tolist() for name, value in zip(names, found, strict=True)})


def test_a_killed_process_leaves_a_lost_query_and_others_can_go_on(tmp_path):
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_die, args=(tmp_path / "l",))
    process.start()
    process.join()
    assert process.exitcode == 9 and figures(tmp_path / "l").under_way == 1
    teacher = Teacher()
    found = ledger(tmp_path / "l", teacher, mask=True).ask([image("a"), image("b")])
    assert found[0] is None and found[1] is not None and teacher.paid == [b"b"]
    assert figures(tmp_path / "l").lost == 1 and figures(tmp_path / "l").paid == 2


def test_two_processes_never_ask_for_the_same(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=_ask_all, args=(tmp_path / "l", tmp_path / "log", offset, results))
        for offset in (0, 5)
    ]
    for process in processes:
        process.start()
    answers = [results.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    assert answers[0] == answers[1] and len(answers[0]) == 12
    assert sorted((tmp_path / "log").read_text().split()) == sorted(f"x{n}" for n in range(12))
    assert figures(tmp_path / "l").paid == 12


def test_texts_become_unit_vectors(tmp_path):
    teacher = Teacher([[[2.0] + [0.0] * 5, [0.0, 3.0] + [0.0] * 4]])
    box = ledger(tmp_path / "l", teacher, unit_norm=False, price=0.25)
    torch.testing.assert_close(box.encode_text(["a dog", "a cat"]), torch.eye(6)[:2])
    assert text_query("a dog").content != text_query("A dog").content and figures(tmp_path / "l").cost == 0.5
    teacher.script = [NotServed("long", refused=True)]
    with pytest.raises(UserError, match="gave no vector for the text 'too long'"):
        ledger(tmp_path / "l", teacher, mask=True).encode_text(["too long"])


def test_other_files_are_not_taken_for_ledgers(tmp_path):
    (tmp_path / "text").write_text("no data base, but long enough to be looked at" * 20)
    with pytest.raises(UserError, match="text is no query ledger"):
        ledger(tmp_path / "text", Teacher())
    with pytest.raises(UserError, match="ledger .*nowhere does not exist"):
        report(tmp_path / "nowhere")
    base = sqlite3.connect(tmp_path / "newer")
    base.execute("PRAGMA user_version = 9")
    base.close()
    with pytest.raises(UserError, match="has version 9, this code reads 2"):
        ledger(tmp_path / "newer", Teacher())


def test_a_ledger_that_cannot_be_opened_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for path, told in ((tmp_path, "cannot be opened"), (tmp_path / "file" / "x.sqlite", "it is a file")):
        with pytest.raises(UserError, match=f"ledger .*{told}"):
            ledger(path, Teacher())
