from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest

from actors.mailbox import Mailbox
from gcml_ray.push.wire import Buffer, Expectation, PushHeader, checksum

BUFFER: Buffer = np.arange(4, dtype=np.float32)
SENDERS = frozenset("ABCD")


def header(sender: str, *, round_number: int = 1, buffer: Buffer = BUFFER) -> PushHeader:
    return PushHeader("run", round_number, sender, 5, "net", "ct", (), 4, "float32", checksum(buffer))


def expect(sender: str) -> Expectation:
    del sender
    return Expectation("run", SENDERS, "net", "ct", (), 4, oldest_round=1, newest_round=9)


def deliver(mailbox: Mailbox, sender: str, *, round_number: int = 1) -> str:
    return mailbox.deliver(header(sender, round_number=round_number), BUFFER, expect=expect)


def deliver_other(mailbox: Mailbox, sender: str, *, round_number: int) -> str:
    other = BUFFER + np.float32(1)
    return mailbox.deliver(header(sender, round_number=round_number, buffer=other), other, expect=expect)


def test_pushes_are_taken_in_the_order_of_names_not_of_arrival() -> None:
    mailbox = Mailbox(3)
    for sender in "CAB":
        assert deliver(mailbox, sender) == ""
    assert [head.sender for head, _ in mailbox.take()] == ["A", "B", "C"]


def test_take_empties_the_mailbox() -> None:
    mailbox = Mailbox(1)
    deliver(mailbox, "A")
    mailbox.take()
    assert mailbox.take() == []


def test_full_mailbox_refuses_another_sender_and_keeps_the_first() -> None:
    mailbox = Mailbox(1)
    deliver(mailbox, "B")
    assert deliver(mailbox, "A") == "mailbox full: max_incoming is 1"
    assert [head.sender for head, _ in mailbox.take()] == ["B"]


def test_newer_push_of_a_sender_replaces_its_older_one_also_when_full() -> None:
    mailbox = Mailbox(1)
    deliver(mailbox, "A", round_number=1)
    assert deliver(mailbox, "A", round_number=2) == ""
    assert [head.round_number for head, _ in mailbox.take()] == [2]


@pytest.mark.parametrize("second", [1, 2])
def test_same_or_older_round_of_a_sender_is_a_duplicate(second: int) -> None:
    mailbox = Mailbox(2)
    deliver(mailbox, "A", round_number=2)
    assert deliver(mailbox, "A", round_number=second).startswith("duplicate: round 2 of A")


def test_sender_with_a_new_process_may_go_back_to_an_older_round() -> None:
    mailbox = Mailbox(2)
    deliver(mailbox, "A", round_number=5)
    deliver(mailbox, "B", round_number=5)
    mailbox.forget(["A"])
    assert deliver_other(mailbox, "A", round_number=3) == ""
    assert deliver(mailbox, "B", round_number=3) == "duplicate: round 5 of B has been here"
    assert deliver_other(mailbox, "A", round_number=3) == "duplicate: round 3 of A has been here"


def test_what_the_old_process_sent_last_is_refused_once_whatever_its_round() -> None:
    """It would be no new model, and for the judge a replay: the sender would be distrusted for being restarted.

    A site that keeps its weights, as at its epsilon limit, goes on to send them.
    """
    mailbox = Mailbox(2)
    deliver(mailbox, "A", round_number=5)
    mailbox.forget(["A"])
    assert deliver(mailbox, "A", round_number=6) == "duplicate: A has sent exactly this before its restart"
    assert deliver(mailbox, "A", round_number=3) == ""
    assert deliver_other(mailbox, "A", round_number=4) == ""
    assert deliver(mailbox, "A", round_number=5) == ""  # an ordinary push again; repeats are for the judge


def test_second_restart_before_anything_was_sent_remembers_what_the_first_did() -> None:
    mailbox = Mailbox(2)
    deliver(mailbox, "A", round_number=5)
    mailbox.forget(["A"])
    mailbox.forget(["A"])
    assert deliver(mailbox, "A", round_number=5) == "duplicate: A has sent exactly this before its restart"


def test_refused_push_leaves_nothing_behind() -> None:
    mailbox = Mailbox(2)
    spoilt = replace(header("A"), checksum="0")
    assert mailbox.deliver(spoilt, BUFFER, expect=expect).startswith("checksum")
    assert mailbox.take() == []


def test_foreign_object_instead_of_a_header_is_refused_not_raised() -> None:
    refusal = Mailbox(1).deliver({"sender": "A"}, BUFFER, expect=expect)  # type: ignore[arg-type]
    assert refusal == "header: expected a PushHeader, got dict"


def test_sender_that_is_no_name_is_refused_not_raised() -> None:
    assert Mailbox(1).deliver(replace(header("A"), sender=["A"]), BUFFER, expect=expect) == (
        "header: sender must be a text, got list"
    )


def test_buffer_is_kept_as_it_came_without_a_copy() -> None:
    mailbox = Mailbox(1)
    deliver(mailbox, "A")
    assert mailbox.take()[0][1] is BUFFER


def test_concurrent_deliveries_never_exceed_the_capacity() -> None:
    """Eight threads at a gate: two of four senders fit; each sender's second copy is a duplicate or finds it full."""
    mailbox = Mailbox(2)
    gate = threading.Barrier(8)
    answers: list[str] = []

    def push(sender: str) -> None:
        gate.wait(timeout=60)
        answers.append(deliver(mailbox, sender))

    threads = [threading.Thread(target=push, args=(sender,)) for sender in "ABCD" * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert answers.count("") == 2
    assert len(answers) == 8
    assert len(mailbox.take()) == 2


def test_push_that_claims_a_later_round_is_left_out_and_keeps_no_true_one_away() -> None:
    mailbox = Mailbox(2)
    assert deliver_other(mailbox, "A", round_number=8) == ""
    assert deliver(mailbox, "B", round_number=2) == ""
    assert [head.sender for head, _ in mailbox.take(newest_round=2)] == ["B"]
    assert deliver(mailbox, "A", round_number=2) == "duplicate: round 2 of A has been here"
    assert deliver(mailbox, "A", round_number=3) == ""
    assert [(head.sender, head.round_number) for head, _ in mailbox.take(newest_round=3)] == [("A", 3)]


def test_push_of_an_earlier_round_is_taken_later() -> None:
    mailbox = Mailbox(1)
    deliver(mailbox, "A", round_number=2)
    assert [head.round_number for head, _ in mailbox.take(newest_round=5)] == [2]
