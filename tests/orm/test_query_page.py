"""docs/queries.md says what the library does, since it is written by it."""

from __future__ import annotations

import pytest
import sqlalchemy
from orm.fill_forms import AS_GIVEN
from orm.query_page import PAGE, SECTIONS, page
from sqlalchemy import Engine

from sqla_byok import Byok

SQLALCHEMY_2_0 = sqlalchemy.__version__.startswith("2.0.")


def _verdicts(content: str) -> list[str]:
    """The forms and what becomes of them, without the reasons, and without the one form that 2.0 does not have."""
    lines = [line for line in content.splitlines() if "several conflict clauses" not in line]
    return [line.split(" | refused | ")[0] for line in lines]


@AS_GIVEN
@pytest.mark.parametrize("sync_url", ["sqlite"], indirect=True)
def test_the_page_is_what_the_forms_do(byok: Byok, engine: Engine, request: pytest.FixtureRequest) -> None:
    """A form that was added, or does something else now, is on the page; run with --update-snapshots."""
    written = page(byok, engine)
    if request.config.getoption("--update-snapshots") and not SQLALCHEMY_2_0:
        PAGE.write_text(written, encoding="utf-8")
    on_file = PAGE.read_text(encoding="utf-8")
    if SQLALCHEMY_2_0:  # there nulls_last() of a label is refused earlier, with another reason
        assert _verdicts(on_file) == _verdicts(written)
    else:
        assert on_file == written


def test_every_table_of_forms_is_on_the_page() -> None:
    """None of the sections is empty, and both verdicts are there."""
    sections = PAGE.read_text(encoding="utf-8").split("\n## ")[1:]
    assert [section.splitlines()[0] for section in sections] == list(SECTIONS)
    for section in sections:
        verdict = "refused" if section.startswith("Refused") else "works"
        assert section.count(f" | {verdict} | ") >= 30
