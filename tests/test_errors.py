"""The exceptions: their tree, their attributes, and that they reach the caller whole."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Integer, create_engine, literal, select
from sqlalchemy.exc import DontWrapMixin
from sqlalchemy.types import TypeDecorator

from sqla_byok import errors
from sqla_byok.errors import (
    AccessDeniedError,
    ByokError,
    KeyDeletedError,
    KeyDisabledError,
    KmsError,
    KmsNoAnswerError,
    KmsRefusedError,
    MissingExtraError,
    TenantMismatchError,
    ThrottledError,
    WrongKeyError,
)

CLASSES = [getattr(errors, name) for name in errors.__all__]
each_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


def drawn_tree() -> dict[str, str | None]:
    """Each class of the module docstring's drawing, with its parent."""
    parents: dict[str, str | None] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        drawn = re.match(r" {4}([│├└─ ]*)(\w+Error)\b", line)
        if drawn is None:
            continue
        depth = len(drawn[1]) // 4
        path = [*path[:depth], drawn[2]]
        parents[drawn[2]] = path[depth - 1] if depth else None
    return parents


def test_the_drawn_tree_is_the_real_one() -> None:
    """A reader who catches a branch of the drawing catches what stands below it, and nothing is left out."""
    real = {
        cls.__name__: next((base.__name__ for base in cls.__bases__ if issubclass(base, ByokError)), None)
        for cls in CLASSES
    }
    assert drawn_tree() == real


def test_all_names_every_exception_in_order() -> None:
    """``from sqla_byok.errors import *`` gives every exception of the module and nothing else."""
    defined = [
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and value.__module__ == errors.__name__ and issubclass(value, BaseException)
    ]
    assert errors.__all__ == sorted(defined)


class _Raises(TypeDecorator[int]):
    impl = Integer
    cache_ok = True

    def __init__(self, cls: type[ByokError]) -> None:
        super().__init__()
        self.cls = cls

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        raise self.cls("the reason")


@each_class
def test_sqlalchemy_passes_it_on_as_it_is(cls: type[ByokError]) -> None:
    """Raised while a value is bound, it is not put into a StatementError that would show the parameters."""
    assert issubclass(cls, DontWrapMixin)
    with create_engine("sqlite://").connect() as connection, pytest.raises(cls) as caught:
        connection.execute(select(literal(5, _Raises(cls))))
    assert type(caught.value) is cls
    assert str(caught.value) == "the reason"


def states(cls: type[ByokError]) -> st.SearchStrategy[dict[str, Any]]:
    """Keyword arguments that the class takes."""
    text = st.none() | st.text(st.characters(), max_size=20)
    named: dict[str, st.SearchStrategy[Any]] = {"tenant": text, "column": text}
    if issubclass(cls, TenantMismatchError):
        named["owner"] = text
    if issubclass(cls, KmsError):
        named["action_by"] = st.sampled_from([None, "customer", "operator"])
        named["retry_after"] = st.none() | st.floats(0, 1e6)
    return st.fixed_dictionaries({}, optional=named)


def shown(error: ByokError) -> dict[str, Any]:
    """All that a caller can read from it."""
    names = {"tenant", "column", "owner", "retryable", "action_by", "retry_after", "msg", "hint", "__notes__"}
    return {
        "type": type(error),
        "args": error.args,
        "str": str(error),
        "repr": repr(error),
        **{name: getattr(error, name, None) for name in names},
    }


def ways() -> list[Any]:
    """Every way in which an exception is copied, within a process or to another."""
    pickled = [
        lambda error, protocol=protocol: pickle.loads(pickle.dumps(error, protocol))  # noqa: S301 - our own bytes
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    ]
    return [*pickled, copy.copy, copy.deepcopy]


@each_class
@given(data=st.data(), message=st.text(st.characters()))
def test_a_copy_tells_the_same(cls: type[ByokError], data: st.DataObject, message: str) -> None:
    """By every pickle protocol, copy and deepcopy: the class, the message, the attributes, those of a handler too."""
    error = cls(message, **data.draw(states(cls)))
    error.hint = "set by a handler"  # type: ignore[attr-defined]
    if isinstance(error, KmsError):
        error.retryable = data.draw(st.booleans())
    if sys.version_info >= (3, 11):
        error.add_note("a note")
    for way in ways():
        assert shown(way(error)) == shown(error)


class _OfAUserError(KeyDisabledError):
    def __init__(self, message: str, ticket: int) -> None:
        super().__init__(message, tenant="t1", retry_after=5.0)
        self.ticket = ticket


def test_a_users_subclass_with_other_arguments_is_copied_too() -> None:
    """A subclass may take arguments of its own; task queues still carry it."""
    for way in ways():
        error = way(_OfAUserError("disabled", 17))
        assert (type(error), str(error), error.tenant, error.retry_after, error.ticket) == (
            _OfAUserError, "disabled", "t1", 5.0, 17
        )  # fmt: skip


@pytest.mark.parametrize(
    "cls", [cls for cls in CLASSES if issubclass(cls, KmsError)], ids=lambda cls: cls.__name__
)
def test_a_refusal_is_final_and_no_answer_may_be_tried_again(cls: type[KmsError]) -> None:
    """What a caller decides on: whether to retry, who must act, and when."""
    error = cls("…")
    unanswered = issubclass(cls, KmsNoAnswerError)
    assert not (unanswered and issubclass(cls, KmsRefusedError)), "either no, or no answer"
    ours = unanswered or cls is WrongKeyError  # a wrapped key that is not this key's: our keystore is wrong
    assert (error.retryable, error.action_by, error.retry_after) == (
        unanswered, "operator" if ours else "customer", None
    )  # fmt: skip


@pytest.mark.parametrize("cls", [AccessDeniedError, ThrottledError, KeyDeletedError])
@pytest.mark.parametrize("who", ["customer", "operator"])
def test_a_provider_says_who_must_act_and_when(cls: type[KmsError], who: Any) -> None:
    """One outcome may be the customer's doing or ours; it holds for this exception alone."""
    error = cls("…", tenant="t1", action_by=who, retry_after=2.5)
    assert (error.tenant, error.action_by, error.retry_after) == ("t1", who, 2.5)
    assert cls("…").action_by == ("operator" if issubclass(cls, KmsNoAnswerError) else "customer")


def test_a_missing_extra_is_an_import_error() -> None:
    """Whoever guards an import by ``except ImportError`` catches it, message and all."""
    with pytest.raises(ImportError, match=r"^install sqla-byok\[aws\]$") as caught:
        raise MissingExtraError("install sqla-byok[aws]")
    assert caught.value.msg == "install sqla-byok[aws]"


def test_attributes_default_to_none() -> None:
    """Every exception has a tenant and a column to ask for, known or not."""
    for cls in CLASSES:
        assert (cls("…").tenant, cls("…").column) == (None, None)
        error = cls("…", tenant="t1", column="patient.mrn")
        assert (error.tenant, error.column) == ("t1", "patient.mrn")
