"""Sealed: what a column in mode="direct" reads as on an async engine, before it is revealed."""

from __future__ import annotations

import copy
import json
import operator
import pickle
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError, field_serializer
from pydantic_core import PydanticSerializationError
from sqlalchemy import String

from sqla_byok import Encrypted, Sealed

STORED = b"\xb1\x10" + bytes(16) + b"\x00ciphertext"
SSN = Sealed("patient.ssn", STORED)


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (str(SSN), "<Sealed patient.ssn>"),
        (repr(SSN), "<Sealed patient.ssn>"),
        (f"{SSN}", "<Sealed patient.ssn>"),
        (f"{SSN:>22}", "  <Sealed patient.ssn>"),
        ("%s" % SSN, "<Sealed patient.ssn>"),  # noqa: UP031 - one of the ways
    ],
)
def test_it_shows_its_column_and_nothing_else(shown: str, text: str) -> None:
    """A page or a log line says that the value is sealed, instead of ciphertext or a value."""
    assert shown == text


def test_it_equals_the_same_stored_value_only() -> None:
    """Two reads of one value are equal, also as keys; None is never equal, so a test for it works."""
    same = Sealed("patient.ssn", STORED)
    assert same == SSN
    assert len({SSN, same}) == 1
    assert Sealed("patient.ssn", STORED + b"x") != SSN
    assert Sealed("visit.code", STORED) != SSN
    assert SSN != None  # noqa: E711 - what is tested
    assert not SSN == None  # noqa: E711, SIM201


@pytest.mark.parametrize("other", ["078-05-1120", "", b"", 0, False, STORED, object()])
def test_comparing_it_with_a_value_raises(other: Any) -> None:
    """``if patient.ssn == "…"`` does not silently take the wrong branch."""
    for compare in (operator.eq, operator.ne, operator.lt, operator.ge):
        for pair in ((SSN, other), (other, SSN)):
            with pytest.raises(TypeError):
                compare(*pair)
    with pytest.raises(TypeError):
        operator.contains([other], SSN)


def test_its_truth_is_unknown() -> None:
    """``if patient.hiv_positive`` on a sealed False is not taken for True."""
    with pytest.raises(TypeError, match=r"areveal"):
        bool(SSN)


def test_it_can_be_copied_and_pickled() -> None:
    """It is ciphertext, and may pass through a task queue or a cache."""
    for made in (copy.copy(SSN), copy.deepcopy(SSN), pickle.loads(pickle.dumps(SSN))):  # noqa: S301 - our own
        assert (made, made.column, made.stored) == (SSN, "patient.ssn", STORED)


def test_json_refuses_it() -> None:
    """An API answer does not leave with a placeholder in the place of a value."""
    with pytest.raises(TypeError):
        json.dumps({"ssn": SSN})
    with pytest.raises(TypeError):
        vars(SSN)  # what serializers fall back on


class Answer(BaseModel):
    ssn: str | Sealed


class Masked(BaseModel):
    ssn: str | Sealed

    @field_serializer("ssn", when_used="json")
    def _mask(self, value: str | Sealed) -> str:
        return "sealed" if isinstance(value, Sealed) else value


def test_pydantic_takes_it_and_does_not_write_it() -> None:
    """A response model may have it in a field, and says what to show of it, or the answer fails."""
    answer = Answer(ssn=SSN)
    assert answer.ssn is SSN
    assert answer.model_dump() == {"ssn": SSN}
    with pytest.raises(PydanticSerializationError, match="Sealed"):
        answer.model_dump_json()
    with pytest.raises(ValidationError):
        TypeAdapter(Sealed).validate_python("078-05-1120")
    assert Masked(ssn=SSN).model_dump_json() == '{"ssn":"sealed"}'
    assert Answer(ssn="078-05-1120").model_dump_json() == '{"ssn":"078-05-1120"}'


def test_the_type_compares_without_raising() -> None:
    """A flush that finds a new value in the place of a sealed one, or a sealed one unchanged, goes on."""
    type_ = Encrypted(String, mode="direct")
    assert type_.compare_values(SSN, copy.copy(SSN)) is True
    assert type_.compare_values(SSN, "x") is False
    assert type_.compare_values("x", SSN) is False
    assert type_.compare_values(None, SSN) is False
    assert type_.compare_values("x", "x") is True
