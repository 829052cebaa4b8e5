"""Prompt lookup: matches, tracks behind differences, replaced tokens, and what is learned from them."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_moe.speculate.guess import MOST_GUESSES, NO_GUESS
from offload_moe.speculate.ngram import LONGEST, NgramSource
from offload_moe.speculate.places import MOST_PLACES, Places
from offload_moe.speculate.replaced import Replaced
from offload_moe.speculate.track import MOST_TRACKS, PATIENCE, REACH, Track, tracks_behind
from offload_moe.speculate.trust import EXPECTED, Trust, Way

IDS = st.lists(st.integers(0, 3), max_size=60)
RECORD = [1, 2, 3, 50, 4, 5, 6, 51, 7, 8, 9]  # 50 and 51 are values


def ngrams(ids: Sequence[int], answer: Sequence[int] = ()) -> NgramSource:
    source = NgramSource()
    source.begin(ids)
    for token in answer:
        source.take(token)
    return source


def num_right(source: NgramSource, token: int) -> int:
    """Whether the first guess is this token, which comes."""
    is_right = source.guess(MOST_GUESSES).tokens[:1] == (token,)
    source.take(token)
    return is_right


def test_the_longest_match_is_continued() -> None:
    ids = [1, 2, 3, 4, 50, 51, 9, 3, 4, 60, 61, 1, 2, 3, 4]
    assert ngrams(ids).guess(4).tokens == (50, 51, 9)
    assert ngrams([*ids[:-4], 9, 3, 4]).guess(1).tokens == (60,)


def test_of_equal_matches_the_latest_counts() -> None:
    assert ngrams([2, 3, 50, 8, 2, 3, 60, 7, 2, 3]).guess(1).tokens == (60,)


def test_a_repetition_goes_on() -> None:
    text = [5, 6, 7] * 4
    assert ngrams([9, *text]).guess(7).tokens == (5, 6, 7, 5, 6, 7, 5)
    assert ngrams([4] * 8).guess(3).tokens == (4, 4, 4)


@pytest.mark.parametrize("ids", [[], [1], [1, 2], [1, 2, 3, 4]])
def test_nothing_is_guessed_without_a_match(ids: list[int]) -> None:
    assert ngrams(ids).guess(7) == NO_GUESS


def test_longer_matches_are_of_higher_kinds() -> None:
    text = list(range(30))
    kinds = [ngrams([*text, 99, *text[20 - length : 20]]).guess(1).kind for length in (1, 2, 3, 4, 6, 10)]
    assert kinds == [0, 1, 2, 3, 4, 6]
    assert all(Way("match", rank) in EXPECTED for rank in range(6))


def test_a_guess_ends_where_it_is_no_longer_likely() -> None:
    text = list(range(20))
    assert ngrams([*text, 99, 5, 6]).guess(7).tokens == (7, 8)
    assert ngrams([*text, 99, *range(10)]).guess(7).tokens == (10, 11, 12, 13, 14, 15, 16)


@given(IDS)
def test_the_first_guess_is_what_followed_a_longest_match(ids: list[int]) -> None:
    guess, last = ngrams(ids).guess(1), len(ids)
    lengths = {
        end: next(n for n in range(LONGEST + 1) if n == min(LONGEST, end) or ids[end - n - 1] != ids[last - n - 1])
        for end in range(1, last)
    }
    pairs, singles = ([end for end, length in lengths.items() if length >= least][-MOST_PLACES:] for least in (2, 1))
    seen = pairs or singles
    if not seen:
        assert guess == NO_GUESS
        return
    longest = max(lengths[end] for end in seen)
    assert guess.tokens == (ids[max(end for end in seen if lengths[end] == longest)],)


@given(IDS, IDS, st.integers(1, 7))
def test_guesses_change_nothing(prompt: list[int], answer: list[int], most: int) -> None:
    source, twin = ngrams(prompt), ngrams(prompt)
    for token in answer:
        guess = source.guess(most)
        assert source.guess(most) == guess
        assert len(guess.tokens) <= most
        source.take(token)
        twin.take(token)
    assert source.guess(most) == twin.guess(most)


@given(IDS, IDS, IDS)
def test_a_sequence_that_begins_alike_is_as_a_new_one(first: list[int], second: list[int], answer: list[int]) -> None:
    source = ngrams(first)
    source.begin(second)
    fresh = ngrams(second)
    for token in answer:
        assert source.guess(7) == fresh.guess(7)
        source.take(token)
        fresh.take(token)
    assert source.guess(7) == fresh.guess(7)


def test_only_new_tokens_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    source, added, add = ngrams(range(5_000), [1, 2, 3]), [], Places.add
    monkeypatch.setattr(Places, "add", lambda places, ids: (added.append(ids[-1]), add(places, ids)))
    source.begin([*range(5_000), 1, 2, 7, 8])  # a template writes the end of an answer otherwise
    assert added == [7, 7, 8, 8]  # pairs and single tokens


def test_many_places_of_a_pair_are_passed_over() -> None:
    assert len([*Places(1).of_end([5])]) == 0
    places, ids = Places(2), list[int]()
    for token in [1, 2] * 100:
        ids.append(token)
        places.add(ids)
    assert [*places.of_end(ids)] == [198 - 2 * at for at in range(MOST_PLACES)]


def test_a_track_goes_on_behind_a_difference() -> None:
    """The token behind the changed value stands elsewhere, too, and later: only the record says what comes."""
    source = ngrams([*RECORD, 4, 99, 98, 20], [1, 2, 3, 60, 4])
    assert source.guess(1).tokens == (5,)
    for token in (5, 6):
        assert num_right(source, token)
    source.take(61)
    source.take(7)
    assert num_right(source, 8)
    assert num_right(source, 9)


def test_records_with_other_values_are_guessed_but_for_these() -> None:
    source, right = ngrams([*RECORD]), 0
    for at in range(6):
        for token in [1, 2, 3, 60 + at, 4, 5, 6, 70 + at, 7, 8, 9]:
            right += num_right(source, token)
    assert right >= 40  # of 54 that are no values
    for token in (1, 2, 3):
        source.take(token)
    kinds = ngrams([]).certainties
    assert kinds[source.guess(1).kind] < 0.5  # a value, which was never right


@pytest.mark.parametrize("values", [[60], [60, 61, 62], []])
def test_values_may_be_of_another_length(values: list[int]) -> None:
    source = ngrams([*RECORD, 4, 99, 20], [1, 2, 3, *values, 4])
    assert source.guess(1).tokens == (5,)


def test_a_single_token_that_is_alike_by_chance_is_taken_back() -> None:
    ids = [1, 2, 3, 50, 4, 5, 6, 7]
    track = Track(3, 0, 3, 0).behind(6, ids)  # the new value stands in the text behind
    assert (track.place, track.num_alike) == (7, 1)
    track = track.behind(4, ids)
    assert (track.place, track.num_alike, track.firm) == (5, 1, 3)
    track = track.behind(5, ids)
    assert (track.place, track.num_alike, track.firm, track.num_astray) == (6, 2, 6, 0)


def test_tracks_are_few_and_end() -> None:
    ids = [*range(1_000)]
    tracks: list[Track] = []
    for at in range(MOST_TRACKS + 2):
        tracks = tracks_behind(tracks, 5_000, ids, 100 * at)
    assert [track.place for track in tracks] == [400, 300, 200]
    assert tracks_behind(tracks, 5_000, ids, 400 + REACH // 2)[0].place == 400
    for _ in range(PATIENCE):
        tracks = tracks_behind(tracks, 5_000, ids, None)
    assert tracks == []


def test_a_name_that_was_replaced_is_replaced_again() -> None:
    text = [word for at in range(8) for word in (100 + 5 * at, 101 + 5 * at, 102 + 5 * at, 7, 103 + 5 * at)]
    source, right = ngrams(text, text[:2]), []
    for token in text[2:]:
        came = 8 if token == 7 else token
        is_right = num_right(source, came)
        right += [is_right] if came == 8 else []
    assert right[:2] == [False, False]
    assert all(right[4:])


def test_what_is_not_replaced_any_more_is_forgotten() -> None:
    replaced = Replaced()
    replaced.note(7, 8)
    replaced.note(7, 8)
    assert replaced[7] == (8, 2)
    replaced.note(7, 9)
    assert replaced[7] == (9, 1)
    replaced.note(7, 7)
    assert replaced[7] is None


def test_trust_is_of_the_token_before() -> None:
    trust, way = Trust(), Way("match", 3)
    for _ in range(4):
        trust.note_behind("match", 1, is_right=True)
        trust.note_behind("match", 2, is_right=False)
    assert trust.of(way, 1) > 0.8 > trust.of(way, 3) == 0.5 > 0.2 > trust.of(way, 2)
    for _ in range(20):
        trust.note(way, is_right=True)
    assert trust.of(way, 3) > 0.9
