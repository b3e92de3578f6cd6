"""What the keystore keeps of searching: its text, its states, and what each change makes of them."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest

from sqla_byok import (
    ConfigurationError,
    HashSpecChangedError,
    KeystoreConflictError,
    KeystoreTamperedError,
    NotSearchableError,
    SettlingError,
)
from sqla_byok.keys.searchable import NOTHING as NOTHING_WRITTEN
from sqla_byok.keys.searchable import OFF, ON, PENDING, HashSpec, Searchable, SearchableColumns, Written

A, B = HashSpec.of("t.a", "t", "sha256", "str"), HashSpec.of("t.b", "t", "sha256", "str")
NOTHING = Searchable.parse("", "t1")


def states(searchable: Searchable) -> tuple[str, str, str]:
    """Of t.a, t.b and a column nobody has heard of."""
    return searchable.state("t.a"), searchable.state("t.b"), searchable.state("t.x")


def written(*specs: HashSpec, table: str = "t") -> Written:
    return Written(table, {spec.column: spec for spec in specs}, frozenset({"t.x", "t.phone"}))


def limited(now: Searchable, *columns: str) -> Searchable:
    """Both steps of set_searchable()."""
    enabled = frozenset(columns)
    first = now.closed_but(enabled)
    return first.closed(first.closing(enabled))


def test_a_specification_stands_for_its_parts() -> None:
    """Each part counts, and which part it is; the column and its table do not."""
    assert A.digest == B.digest == HashSpec.of("t.a", "other", "sha256", "str").digest
    parts = [("a", "b"), ("ab",), ("a", "b", None), ("a", ["b"]), ("b", "a"), ("a", "b", "")]
    assert len({HashSpec.of("t.a", "t", *each).digest for each in parts}) == len(parts)
    assert len(A.digest) == 32


def test_the_text_is_canonical() -> None:
    """Equal states have equal text, in whatever order they came about; it reads back as what it was."""
    one = NOTHING.noted(written(A, table="s")).noted(written(B))
    two = NOTHING.noted(written(B)).noted(written(A, table="s"))
    assert one.text == two.text
    again = Searchable.parse(one.text, "t1")
    assert again.text == one.text
    assert again.specs == {"t.a": A.digest, "t.b": B.digest}
    assert again.tables == {"s", "t"}
    assert again is Searchable.parse(two.text, "t2")
    assert NOTHING.text == ""
    fewer = limited(one, "t.a")
    assert states(Searchable.parse(fewer.text, "t1")) == states(fewer) == (ON, OFF, OFF)


def test_what_nobody_uses_is_not_kept() -> None:
    """Texts that no tenant has any more take no memory."""
    text = limited(NOTHING, "t.gone").text
    first = Searchable.parse(text, "t1")
    assert first is Searchable.parse(text, "t1")
    del first
    gc.collect()
    from sqla_byok.keys import searchable

    assert text not in searchable._parsed


@pytest.mark.parametrize(
    "text",
    ["x", "[]", "{}", '{"columns":{},"others":"maybe","tables":[]}', '{"columns":{},"others":"pending","tables":[]}',
     '{"columns":{"t.a":["","maybe",[]]},"others":"on","tables":[]}', '{"columns":1,"others":"on","tables":[]}',
     '{"columns":{"t.a":["","on"]},"others":"on","tables":[]}', '{"columns":{},"others":"on"}'],
)  # fmt: skip
def test_what_a_newer_release_wrote_is_refused(text: str) -> None:
    """An authentic text in another format is never half understood."""
    with pytest.raises(KeystoreTamperedError):
        Searchable.parse(text, "t1")


def test_states() -> None:
    """Between on and off a column is pending, either way; what was on stays on, what was never written is no matter."""
    now = NOTHING.noted(written(A, B))
    assert states(now) == (ON, ON, ON)
    assert now.off is None
    now = now.closed_but(frozenset({"t.a"}))
    assert states(now) == (ON, PENDING, OFF)
    assert now.closing(frozenset({"t.a"})) == {"t.b"}
    now = now.closed(frozenset({"t.b"}))
    assert states(now) == (ON, OFF, OFF)
    assert now.off is not None
    assert (now.off("t.a"), now.off("t.b")) == (False, True)
    assert now.closing(frozenset({"t.a"})) == frozenset()
    now = now.closed_but(frozenset({"t.a", "t.b"}))
    assert states(now) == (ON, PENDING, OFF)
    assert now.closing(frozenset({"t.a", "t.b"})) == frozenset()
    assert states(now.rehashed("t.b")) == (ON, ON, OFF)
    assert states(now.rehashed("t.a")) == (ON, PENDING, OFF)
    now = limited(now)
    assert states(now) == (OFF, OFF, OFF)
    assert states(now.closed_but(None)) == (PENDING, PENDING, ON)
    assert now.closed_but(None).closing(None) == frozenset()
    with pytest.raises(ConfigurationError):
        now.rehashed("t.a")
    with pytest.raises(ConfigurationError):
        now.rehashing(A)


def test_what_was_never_written_needs_no_step_between() -> None:
    """There is no row that lacks a hash, so it goes from on to off and back at once."""
    now = NOTHING.closed_but(frozenset({"t.a"}))
    assert states(now) == (ON, OFF, OFF)
    assert now.closing(frozenset({"t.a"})) == frozenset()
    now = now.closed_but(frozenset({"t.b"}))
    assert states(now) == (OFF, ON, OFF)
    assert states(now.noted(written(A, B))) == (OFF, ON, OFF)
    assert states(now.closed_but(None)) == (ON, ON, ON)


def test_a_column_that_is_new_to_a_written_table_is_pending() -> None:
    """Not so in a table that was never written, nor where it is off; noting what is known changes nothing."""
    now = NOTHING.noted(written(A))
    assert states(now) == (ON, ON, ON)
    assert states(now.noted(written(A, B))) == (ON, PENDING, ON)
    assert states(now.noted(written(B, table="u"))) == (ON, ON, ON)
    assert states(limited(now).noted(written(A, B))) == (OFF, OFF, OFF)
    assert now.noted(written(A)) is now
    assert now.noted(NOTHING_WRITTEN) is now
    unseen = HashSpec.of("t.x", "t", "sha256")
    with pytest.raises(NotSearchableError, match="re-hash"):
        now.check("t1", [], [unseen])
    now.check("t1", [], [unseen._replace(table="never written")])
    now.check("t1", [unseen], [A])


def test_what_is_searched_cannot_be_written_without_a_hash() -> None:
    """A model that has a column, and hashes it no more or has not its index, is refused as long as it is searched."""
    end = HashSpec.of("t.end", "t", "last", sources=["t.phone", "t.other"])
    now = NOTHING.noted(written(A, B, end))
    now.check_write("t1", Written("t", {"t.end": end}, frozenset({"t.x", "t.phone"})))
    now.check_write("t1", Written("u", {}, frozenset({"u.a"})))
    for column, name in (("t.a", "t.a"), ("t.phone", "t.end"), ("t.other", "t.end")):
        less = Written("t", {}, frozenset({column, "t.x"}))
        with pytest.raises(HashSpecChangedError, match=name):
            now.check_write("t1", less)
        now.not_searched(name).check_write("t1", less)
        limited(now).check_write("t1", less)
    again = Searchable.parse(now.rehashing(end._replace(sources=("t.y",))).rehashed("t.end").text, "t1")
    again.check_write("t1", Written("t", {}, frozenset({"t.phone"})))
    with pytest.raises(HashSpecChangedError):
        again.check_write("t1", Written("t", {}, frozenset({"t.y"})))


def test_who_knows_nothing_of_the_hashes_does_not_write_while_they_are_made() -> None:
    """The job would not see the row; until it begins, and where the column is off, an earlier release may go on."""
    less, now = Written("t", {}, frozenset({"t.b"})), NOTHING.noted(written(A)).noted(written(A, B))
    now.check_write("t1", less)
    now.not_searched("t.b").check_write("t1", less)
    begun = Searchable.parse(now.rehashing(B).text, "t1")
    assert states(begun) == (ON, PENDING, ON)
    for each in (
        begun,
        begun.closed_but(frozenset({"t.b"})),
        begun.closed_but(frozenset()),  # the job may end before that does
        begun.not_searched("t.b"),
        begun.noted(written(table="u")),
        begun.closed_but(frozenset()).rehashed("t.b"),
    ):
        with pytest.raises(HashSpecChangedError, match=r"t\.b"):
            each.check_write("t1", less)
        each.check_write("t1", written(A, B))
    assert begun.closed_but(frozenset()).closing(frozenset()) == {"t.a", "t.b"}
    limited(begun).check_write("t1", less)


class Stored:
    """What a keystore has, and whoever changes it while others wait."""

    def __init__(self) -> None:
        self.now, self.seen = NOTHING.noted(written(A, B)), [(ON, ON, ON)]
        self.columns = SearchableColumns(self.change, self.settle)
        self.meanwhile: Callable[[], object] = lambda: None

    def change(self, tenant: str, make: Callable[[Searchable], Searchable]) -> Searchable:
        self.now = make(self.now)
        return self.now

    def settle(self) -> None:
        self.seen.append(states(self.now))
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()


def test_disabling_settles_in_between() -> None:
    """And only where there is something to disable; who died on the way is followed by whoever comes next."""
    stored = Stored()
    stored.columns.set("t1", {"t.a"})
    assert stored.seen == [(ON, ON, ON), (ON, PENDING, OFF)]
    stored.columns.set("t1", {"t.a"})
    stored.columns.set("t1", {"t.a", "t.b"})
    assert (len(stored.seen), states(stored.now)) == (2, (ON, PENDING, OFF))
    stored = Stored()
    stored.meanwhile = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        stored.columns.set("t1", set())
    assert states(stored.now) == (PENDING, PENDING, OFF)
    stored.columns.set("t1", set())
    assert (len(stored.seen), states(stored.now)) == (3, (OFF, OFF, OFF))


def test_what_was_enabled_meanwhile_is_not_disabled_at_once() -> None:
    """A process may search it by now."""
    stored = Stored()
    stored.meanwhile = lambda: stored.columns.rehashed("t1", "t.b")
    with pytest.raises(KeystoreConflictError):
        stored.columns.set("t1", {"t.a"})
    assert states(stored.now) == (ON, ON, OFF)


def test_a_new_specification_settles_in_between() -> None:
    """No process searches by the old one any more when the first row is hashed by the new one."""
    stored, other = Stored(), HashSpec.of("t.a", "t", "another")
    stored.meanwhile = lambda: stored.now.check("t1", [A], [])
    stored.columns.rehashing("t1", other)
    assert stored.seen[1:] == [(PENDING, ON, ON)]
    assert states(stored.now) == (PENDING, ON, ON)
    stored.now.check("t1", [other], [])


def test_another_specification_closes_the_search_first() -> None:
    """Then every release writes by its own; from the job's begin on only the one whose hashes it makes."""
    now, other = NOTHING.noted(written(A)), HashSpec.of("t.a", "t", "another")
    now.check("t1", [A, B], [A])
    with pytest.raises(HashSpecChangedError):
        now.check("t1", [], [other])
    closing = Searchable.parse(now.noted(written(other)).text, "t1")
    assert states(closing) == (PENDING, ON, ON)
    with pytest.raises(SettlingError) as caught:
        closing.check("t1", [other], [])
    assert (caught.value.tenant, caught.value.column, caught.value.retryable) == ("t1", "t.a", True)
    for spec in (A, other):
        with pytest.raises(NotSearchableError):
            closing.check("t1", [], [spec])
    closing.check("t1", [A], [])
    assert closing.noted(written(A)) is closing
    assert not closing.noted(written(other)).knows(written(other))
    mixed = Searchable.parse(closing.noted(written(other), lambda *_: True).text, "t1")
    assert states(mixed) == (PENDING, ON, ON)
    for spec in (A, other):
        mixed.check("t1", [spec], [])
        assert mixed.knows(written(spec))
    later = mixed.rehashing(other)
    later.check("t1", [other], [])
    with pytest.raises(HashSpecChangedError):
        later.check("t1", [A], [])
    with pytest.raises(NotSearchableError):
        later.check("t1", [], [other])
    later.rehashed("t.a").check("t1", [other], [other])


def test_each_time_of_closing_settles_by_itself() -> None:
    """Who saw the one before does not take this one for settled."""
    other, marks = HashSpec.of("t.a", "t", "another"), list[str]()
    for _ in range(2):
        closing = NOTHING.noted(written(A)).noted(written(other))
        closing.noted(written(other), lambda _, mark: bool(marks.append(mark)))
    assert len({*marks}) == len(marks) == 2


def test_another_specification_of_a_unique_column_is_refused() -> None:
    """Hashes of two kinds in one index keep nothing apart."""
    now, other = NOTHING.noted(written(A)), HashSpec.of("t.a", "t", "another")
    unique = written(other)
    unique.unique = frozenset({"t.a"})
    assert now.noted(unique) is now
    with pytest.raises(HashSpecChangedError):
        now.check("t1", [other], [])
