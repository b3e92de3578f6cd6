"""What the keystore keeps of searching: its text, its states, and what each change makes of them."""

from __future__ import annotations

import gc

import pytest

from sqla_byok import ConfigurationError, HashSpecChangedError, KeystoreTamperedError, NotSearchableError
from sqla_byok.keys.searchable import OFF, ON, PENDING, HashSpec, Searchable

A, B = HashSpec.of("t.a", "sha256", "str"), HashSpec.of("t.b", "sha256", "str")
NOTHING = Searchable.parse("", "t1")


def states(searchable: Searchable) -> tuple[str, str, str]:
    """Of t.a, t.b and a column nobody has heard of."""
    return searchable.state("t.a"), searchable.state("t.b"), searchable.state("t.x")


def test_a_specification_stands_for_its_parts() -> None:
    """Each part counts, and which part it is; the column does not."""
    assert A.digest == B.digest
    parts = [("a", "b"), ("ab",), ("a", "b", None), ("a", ["b"]), ("b", "a"), ("a", "b", "")]
    assert len({HashSpec.of("t.a", *each).digest for each in parts}) == len(parts)
    assert len(A.digest) == 32


def test_the_text_is_canonical() -> None:
    """Equal states have equal text, in whatever order they came about; it reads back as what it was."""
    one = NOTHING.recorded({"t.a": A.digest}).recorded({"t.b": B.digest})
    two = NOTHING.recorded({"t.b": B.digest, "t.a": A.digest})
    assert one.text == two.text
    again = Searchable.parse(one.text, "t1")
    assert again.text == one.text
    assert again.specs == {"t.a": A.digest, "t.b": B.digest}
    assert again is Searchable.parse(two.text, "t2")
    assert NOTHING.text == ""
    limited = one.limited_to({"t.a"})
    assert states(Searchable.parse(limited.text, "t1")) == states(limited) == (ON, OFF, OFF)


def test_what_nobody_uses_is_not_kept() -> None:
    """Texts that no tenant has any more take no memory."""
    text = NOTHING.limited_to({"t.gone"}).text
    first = Searchable.parse(text, "t1")
    assert first is Searchable.parse(text, "t1")
    del first
    gc.collect()
    from sqla_byok.keys import searchable

    assert text not in searchable._parsed


@pytest.mark.parametrize(
    "text",
    ["x", "[]", "{}", '{"columns":{},"others":"maybe"}', '{"columns":{"t.a":["","maybe"]},"others":"on"}',
     '{"columns":{"t.a":[""]},"others":"on"}', '{"columns":1,"others":"on"}'],
)  # fmt: skip
def test_what_a_newer_release_wrote_is_refused(text: str) -> None:
    """An authentic text in another format is never half understood."""
    with pytest.raises(KeystoreTamperedError):
        Searchable.parse(text, "t1")


def test_states() -> None:
    """From off a column goes to pending, never straight to on; what was on stays on."""
    now = NOTHING.recorded({"t.a": A.digest})
    assert states(now) == (ON, ON, ON)
    assert now.off is None
    now = now.limited_to({"t.a"})
    assert states(now) == (ON, OFF, OFF)
    assert now.off is not None
    assert (now.off("t.a"), now.off("t.b")) == (False, True)
    now = now.limited_to({"t.a", "t.b"})
    assert states(now) == (ON, PENDING, OFF)
    assert states(now.rehashed("t.b")) == (ON, ON, OFF)
    assert states(now.rehashed("t.a")) == (ON, PENDING, OFF)
    now = now.limited_to(set())
    assert states(now) == (OFF, OFF, OFF)
    now = now.recorded({"t.x": A.digest}).limited_to(None)
    assert states(now) == (PENDING, PENDING, PENDING)
    assert now.state("t.never written") == ON
    assert now.limited_to({"t.a"}).state("t.a") == PENDING
    with pytest.raises(ConfigurationError):
        NOTHING.limited_to(set()).rehashed("t.a")
    with pytest.raises(ConfigurationError):
        NOTHING.limited_to(set()).rehashing(A)


def test_the_first_specification_holds() -> None:
    """A second one is not noted over it; only a re-hash changes it."""
    now = NOTHING.recorded({"t.a": A.digest})
    other = HashSpec.of("t.a", "another")
    assert now.recorded({"t.a": other.digest}) is now
    now.check("t1", [A, B], [A, B])
    with pytest.raises(HashSpecChangedError):
        now.check("t1", [other], [])
    with pytest.raises(HashSpecChangedError):
        now.check("t1", [], [other])
    later = now.rehashing(other)
    later.check("t1", [other], [])
    with pytest.raises(HashSpecChangedError):
        later.check("t1", [A], [])
    with pytest.raises(NotSearchableError):
        later.check("t1", [], [other])
    later.rehashed("t.a").check("t1", [other], [other])
