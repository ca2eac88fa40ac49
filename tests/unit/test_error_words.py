"""What is kept of an error that a site's code raises."""

from __future__ import annotations

from actors.site_pool import LONGEST_WORDS, words_of


class MuteError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def test_an_error_is_told_in_its_words_or_by_its_type() -> None:
    assert words_of(ValueError("shapes differ")) == "shapes differ"
    assert words_of(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert words_of(MuteError()) == "MuteError"


def test_very_many_words_are_cut_and_counted() -> None:
    words = words_of(ValueError("x" * 50_000))
    assert words.startswith("x" * LONGEST_WORDS + "... (50,000")
    assert len(words) < LONGEST_WORDS + 50
