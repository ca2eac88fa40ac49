"""How long a site that is being restarted may take to come back."""

from __future__ import annotations

from actors.member import LONGEST_PAUSE_S, Absence


def test_site_that_cannot_be_reached_is_asked_again_until_its_time_is_over() -> None:
    """0.5 + 1 + 2 + 4 + 8 + 8 ... seconds: of an hour that is some 450 attempts, and no end after a few of them."""
    absence, now, attempts = Absence(3, deadline=3600.0), 0.0, 0
    pauses = []
    while (later := absence.next_attempt(now)) is not None:
        assert later.retry_at is not None
        pauses.append(later.retry_at - now)
        absence, now, attempts = later, later.retry_at, attempts + 1
    assert pauses[:6] == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0]
    assert max(pauses) == LONGEST_PAUSE_S
    assert now == 3600.0
    assert 440 < attempts < 460
