"""Stop strings, however the text is cut into tokens."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qllama.engine.stop import StopChecker


def cuts(text):
    """Every way to cut `text` into pieces."""
    inner = range(1, len(text))
    for number in range(len(text)):
        for borders in combinations(inner, number):
            ends = [0, *borders, len(text)]
            yield [text[a:b] for a, b in pairwise(ends)]


def run(pieces, stop, burst=1, **options):
    """(text, stop string, number of tokens) of pieces that come `burst` at a time."""
    checker = StopChecker(stop, **options)
    text, tokens = "", 0
    for start in range(0, len(pieces), burst):
        checked = checker.step(pieces[start : start + burst])
        text += checked.text
        tokens += checked.num_tokens
        if checked.stop is not None:
            return text, checked.stop, tokens
    return text + checker.flush(), None, tokens


@pytest.mark.parametrize(
    ("text", "stop", "expected", "end"),
    [
        ("say STOP now", ["STOP"], "say ", 8),
        ("abababc", ["ababc"], "ab", 7),  # a false start that overlaps the real one
        ("aaaab", ["aab"], "aa", 5),
        ("xyEND", ["END", "yE"], "x", 3),  # "yE" is complete first
        ("xabc", ["abc", "bc"], "x", 4),  # complete together: the longest
        ("xabc", ["bc", "abc"], "x", 4),
        ("a\n\nb", ["\n\n"], "a", 3),
        ("ab😀c", ["😀"], "ab", 3),
        ("STOP", ["STOP"], "", 4),
    ],
)
@pytest.mark.parametrize("burst", [1, 3, 100])
def test_every_cut_stops_at_the_same_place(text, stop, expected, end, burst):
    found = text[len(expected) : end]
    for pieces in cuts(text):
        lengths = [sum(map(len, pieces[: n + 1])) for n in range(len(pieces))]
        tokens = next(n for n, length in enumerate(lengths, start=1) if length >= end)
        assert run(pieces, stop, burst) == (expected, found, tokens)
        assert run(pieces, stop, burst, include=True) == (expected + found, found, tokens)


@pytest.mark.parametrize("stop", [["bcd"], ["xyz", "abcde!"], [], ["d", "abcdf"]])
@pytest.mark.parametrize("text", ["abce", "abxab"])
def test_text_without_a_stop_string_comes_out_whole(text, stop):
    for pieces in cuts(text):
        assert run(pieces, stop) == (text, None, len(pieces))


def test_only_a_possible_beginning_is_held_back():
    checker = StopChecker(["</end>"])
    given = [checker.step([piece]).text for piece in ["Hello", " <", "b> <", "/", "en", "x"]]
    assert given == ["Hello", " ", "<b> ", "", "", "</enx"]
    assert checker.flush() == ""


def test_nothing_is_given_that_a_longer_match_takes_back():
    for pieces in cuts("ab stop c"):
        checker = StopChecker(["b stop"])
        seen = ""
        for piece in pieces:
            checked = checker.step([piece])
            seen += checked.text
            assert "a".startswith(seen)
            if checked.stop:
                break


@pytest.mark.parametrize(
    ("min_tokens", "expected"),
    [
        (0, ("", "aa", 2)),
        (1, ("", "aa", 2)),
        (2, ("a", "aa", 3)),  # the string complete with the second token is early
        (3, ("aab", "aa", 5)),
        (4, ("aab", "aa", 5)),
        (5, ("aabaab", None, 6)),
    ],
)
@pytest.mark.parametrize("burst", [1, 6])
def test_early_stop_strings_are_ignored(min_tokens, expected, burst):
    pieces = ["a", "a", "a" if min_tokens == 2 else "b", "a", "a", "b"]
    assert run(pieces, ["aa"], burst, min_tokens=min_tokens) == expected


def test_an_early_string_within_a_held_one_does_not_stop_later():
    assert run(["ab", "ab", "x"], ["ababc", "ab"], min_tokens=2) == ("ababx", None, 3)


def test_tokens_without_text_count():
    assert run(["", "a", "", "b", "c"], ["ab"]) == ("", "ab", 4)


@given(
    text=st.text("ab", max_size=30),
    stop=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=40),
    burst=st.integers(1, 9),
)
def test_any_cut_agrees_with_a_search_of_the_whole_text(text, stop, sizes, burst):
    pieces, position = [], 0
    for size in sizes:
        pieces.append(text[position : position + size])
        position += size
    text = text[:position]
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(s) for s in stop)]
    got, found, tokens = run(pieces, stop, burst)
    if not ends:
        assert (got, found, tokens) == (text, None, len(pieces))
    else:
        longest = max((s for s in stop if text[: ends[0]].endswith(s)), key=len)
        assert (got, found) == (text[: ends[0] - len(longest)], longest)
        assert len("".join(pieces[: tokens - 1])) < ends[0] <= len("".join(pieces[:tokens]))
