import threading

import pytest

from gcml_ray.push import parts
from gcml_ray.push.parts import by_parts


@pytest.mark.parametrize("num_pieces", [0, 1, 3, 4, 8, 9, 200])
def test_every_piece_is_worked_on_once_and_in_order(num_pieces: int) -> None:
    found = by_parts(list, num_pieces)
    assert [number for part in found for number in part] == list(range(num_pieces))


def test_much_work_is_shared_among_threads_and_little_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts.os, "cpu_count", lambda: 2)
    meeting = threading.Barrier(2)  # passes only where two are at work at a time
    assert len(by_parts(lambda numbers: meeting.wait(timeout=10) + len(numbers), 8)) == 2
    assert by_parts(lambda _: threading.get_ident(), 7) == [threading.get_ident()]


def test_what_goes_wrong_in_a_thread_is_raised() -> None:
    def fail(numbers: range) -> None:
        raise ValueError(f"piece {numbers.start}")

    with pytest.raises(ValueError, match="piece 0"):
        by_parts(fail, 100)
