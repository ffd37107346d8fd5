"""Stop texts, whatever the pieces that they come in."""

from hypothesis import given
from hypothesis import strategies as st

from powerinfer_tools.tokens import Stops

LETTERS = st.text("ab\n", max_size=12)


def show(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    """What is shown of pieces, and whether a stop came."""
    guard, shown = Stops(stops), ""
    for piece in pieces:
        shown += guard.push(piece)
        if guard.found:
            return shown, True
    return shown + guard.flush(), False


@given(stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), pieces=st.lists(LETTERS, max_size=8))
def test_pieces_do_not_matter(stops: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)
    shown, found = show(stops, pieces)
    assert found == any(stop in text for stop in stops)
    assert text.startswith(shown)
    if found:
        assert not any(stop in shown for stop in stops)
        assert any(text.startswith(stop, len(shown)) for stop in stops)
    else:
        assert shown == text


def test_holds_back_no_more_than_it_must() -> None:
    guard = Stops(["\nUser:"])
    assert guard.push("one\nUs") == "one"
    assert guard.push("e two") == "\nUse two"
    assert guard.push("\nUser: three") == ""
    assert guard.found


def test_empty_stops_are_none() -> None:
    assert show([""], ["text"]) == ("text", False)
