"""What a user can import, and what importing it costs."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import textwrap
from types import ModuleType
from typing import Any

import pytest

import sqla_byok
from sqla_byok import errors, normalize, testing
from sqla_byok.errors import ByokError

NAMES = [sqla_byok.__name__, *(m.name for m in pkgutil.walk_packages(sqla_byok.__path__, "sqla_byok."))]
MODULES = [importlib.import_module(name) for name in NAMES]
PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (sqla_byok, normalize, testing)
    for name in module.__all__
}
PUBLIC_CODE = {
    name: value for name, value in PUBLIC.items() if inspect.isclass(value) or inspect.isfunction(value)
}

each_module = pytest.mark.parametrize("module", MODULES, ids=NAMES)
each_public = pytest.mark.parametrize("name", PUBLIC_CODE)


@each_module
def test_every_name_in_all_is_there_once(module: ModuleType) -> None:
    """A module's ``__all__`` tells the truth about what it offers."""
    names = getattr(module, "__all__", [])
    assert len(names) == len(set(names))
    assert [name for name in names if not hasattr(module, name)] == []


def test_the_public_names_are_sorted() -> None:
    """A reader finds a name in the package's list where the alphabet puts it."""
    assert sqla_byok.__all__ == sorted(sqla_byok.__all__)


def test_every_exception_can_be_imported_from_the_package() -> None:
    """A user who must catch an exception need not know in which module it stands."""
    assert set(errors.__all__) - set(sqla_byok.__all__) == set()
    assert all(getattr(sqla_byok, name) is getattr(errors, name) for name in errors.__all__)


def test_the_package_offers_nothing_by_accident() -> None:
    """Every name that can be seen on the package is in its ``__all__``, or is a module."""
    seen = {
        name
        for name, value in vars(sqla_byok).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert seen == set(sqla_byok.__all__)


# A module that is of no use without an optional package, and the reason.
NEEDS_MORE = {
    "sqla_byok.testing.conformance": "is a class of pytest's tests",
    "sqla_byok.cli": "is the command, which says what it needs",
}
IMPORTED = [name for name in NAMES if name not in NEEDS_MORE]

IMPORT = """
import sys
import sqlalchemy, sqlalchemy.orm, sqlalchemy.ext.asyncio, sqlalchemy.ext.compiler
import sqlalchemy.dialects.mysql, sqlalchemy.dialects.postgresql, sqlalchemy.dialects.sqlite
import cryptography.hazmat.primitives.ciphers.aead, cryptography.hazmat.primitives.kdf.hkdf
before = set(sys.modules)
import {modules}
roots = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(*sorted(roots - sys.stdlib_module_names - {{"sqlalchemy", "cryptography"}}))
"""


@pytest.mark.parametrize("modules", ["sqla_byok", ", ".join(IMPORTED)], ids=["the package", "every module"])
def test_importing_brings_nothing_but_sqlalchemy_and_cryptography(modules: str) -> None:
    """No provider SDK, driver or optional package is loaded before it is used, or needed to be there."""
    child = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT.format(modules=modules)], capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.split() == ["sqla_byok"]


def methods(value: Any) -> dict[str, Any]:
    """The public methods and properties that a class defines itself."""
    found = {}
    for name, member in vars(value).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if inspect.isfunction(function) and not name.startswith("_"):
            found[name] = function
    return found


def inherits(cls: type, name: str) -> bool:
    """Whether a base outside this library says what the method is for."""
    return any(name in vars(base) for base in cls.__mro__ if not base.__module__.startswith("sqla_byok"))


@each_public
def test_everything_public_says_what_it_is(name: str) -> None:
    """Every public class, function and method has a docstring; what SQLAlchemy asks of a type has SQLAlchemy's."""
    value = PUBLIC_CODE[name]
    assert value.__doc__
    if inspect.isclass(value):
        silent = [method for method, member in methods(value).items() if not member.__doc__]
        assert [method for method in silent if not inherits(value, method)] == []


def raised_in(function: Any) -> set[str]:
    """The names of our exceptions that the function's own code raises."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [
        node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
    ]
    names = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
    return {name for name in names if name in errors.__all__}


def told_by(*texts: str | None) -> set[str]:
    """The exceptions that docstrings name after ``:raises``, with all that are kinds of them."""
    named = {name for text in texts for name in re.findall(r":raises ~?(?:\w+\.)*(\w+):", text or "")}
    bases = tuple(getattr(errors, name) for name in named if name in errors.__all__)
    return {name for name in errors.__all__ if issubclass(getattr(errors, name), bases)} if bases else set()


@each_public
def test_everything_public_says_what_it_raises(name: str) -> None:
    """An exception that a public function raises itself is in its docstring, or a base of it is."""
    value = PUBLIC_CODE[name]
    if not inspect.isclass(value):
        assert raised_in(value) <= told_by(value.__doc__)
        return
    if not issubclass(value, ByokError):
        makers = [
            vars(value)[each]
            for each in ("__init__", "__post_init__", "_check_options")
            if each in vars(value)
        ]
        # A dataclass writes some of them itself.
        makers = [maker for maker in makers if maker.__code__.co_filename != "<string>"]
        raised = set().union(*(raised_in(maker) for maker in makers))
        assert raised <= told_by(value.__doc__, getattr(value.__init__, "__doc__", None))
    for method, function in methods(value).items():
        if not inherits(value, method):
            assert raised_in(function) <= told_by(function.__doc__), method


@each_module
def test_examples_in_docstrings_are_true(module: ModuleType) -> None:
    """What a docstring shows after >>> happens."""
    assert doctest.testmod(module).failed == 0


def test_there_are_examples_to_try() -> None:
    """The test above looks where the examples are."""
    assert len([test for test in doctest.DocTestFinder().find(normalize) if test.examples]) >= 3
