"""What SQL text names: tables where a table can stand, and columns where a column can.

No parser: tokens, and the few words of SQL after which a table stands. Where it is unclear, a name counts; a keyword,
a function, an alias after AS, a string or a comment does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

__all__ = ["Name", "Syntax", "columns_in", "tables_in", "written_in"]


class Syntax(NamedTuple):
    """How a database reads text."""

    mysql: bool = False  # backslashes in strings, and # comments
    ansi_quotes: bool = True  # "x" is a name; to MySQL a string, but where its mode says so
    brackets: bool = False  # [x] is a name
    dollars: bool = False  # $$x$$ is a string
    folds: bool = False  # a name without quotes is one in lower case

    @classmethod
    def of(cls, dialect: Any) -> Syntax:
        """The syntax of a SQLAlchemy dialect; without one, that of the standard."""
        name = getattr(dialect, "name", "")
        mysql = name in ("mysql", "mariadb")
        return cls(
            mysql=mysql,
            ansi_quotes=not mysql or dialect.identifier_preparer.initial_quote == '"',
            brackets=name in ("sqlite", "mssql"),
            dollars=name == "postgresql",
            folds=name == "postgresql",
        )


class Name(NamedTuple):
    """A name, and what stands before it with a dot: a table's schema, or a column's table."""

    name: str
    before: str | None = None


class _Token(NamedTuple):
    text: str  # of a name: without its quotes
    kind: str  # "word", "quoted", "double" (a string to MySQL, but where a table stands), "literal"; else a sign

    @property
    def is_name(self) -> bool:
        return self.kind in ("word", "quoted", "double")

    @property
    def word(self) -> str:
        """In lower case, where it may be a keyword; else empty."""
        return self.text.lower() if self.kind == "word" else ""


_NONE = _Token("", "")


@lru_cache(maxsize=16)
def _pattern(syntax: Syntax, backslashes: bool) -> re.Pattern[str]:
    escaped = r"'(?:[^'\\]|''|\\.)*'"
    literals = (
        [escaped] if backslashes else [f"[eE]{escaped}" if syntax.dollars else escaped[:0], r"'(?:[^']|'')*'"]
    )
    quoted = [r"`(?:[^`]|``)+`"]
    double = r'"(?:[^"\\]|""|\\.)*"' if backslashes else r'"(?:[^"]|"")*"'
    if syntax.brackets:
        quoted.append(r"\[[^\]]+\]")
    if syntax.dollars:
        literals.append(r"(?<!\w)\$(?P<tag>\w*)\$.*?\$(?P=tag)\$")
    literals += [r"%\(\w+\)s", r"(?<![\w.])\d[\w.]*", r"[:@]+\w+"]
    if syntax.mysql:  # what it executes in a comment is no comment
        skipped = [r"--(?=\s|$)[^\n]*", r"\#[^\n]*", r"/\*(?!M?!).*?\*/", r"/\*M?!\d*", r"\*/"]
    else:
        skipped = [r"--[^\n]*", r"/\*.*?\*/"]
    kinds = {
        "skipped": [r"\s+", *skipped],
        "literal": [one for one in literals if one],
        "quoted": quoted,
        "double": [double],
        "word": [r"[^\W\d][\w$]*"],
        "sign": ["."],
    }
    return re.compile("|".join(f"(?P<{kind}>{'|'.join(ways)})" for kind, ways in kinds.items()), re.DOTALL)


def _tokens(text: str, syntax: Syntax, backslashes: bool) -> list[_Token]:
    found = []
    for match in _pattern(syntax, backslashes).finditer(text):
        whole = match[0]
        if match["quoted"] or match["double"]:
            kind = "quoted" if match["quoted"] or syntax.ansi_quotes else "double"
            found.append(_Token(whole[1:-1].replace(whole[-1] * 2, whole[-1]), kind))
        elif match["literal"]:
            found.append(_Token("", "literal"))
        elif match["word"]:
            found.append(_Token(whole, "word"))
        elif match["sign"]:
            found.append(_Token(whole, whole))
    return found


def _readings(text: str, syntax: Syntax) -> Iterator[list[_Token]]:
    """The text's tokens; on MySQL in both ways, where there is a backslash: the server's mode says what that is."""
    if syntax.dollars and re.match(r"\s*do\b", text, re.IGNORECASE):
        text = re.sub(r"\$\w*\$", " ", text)  # a block, which is executed
    yield _tokens(text, syntax, backslashes=syntax.mysql)
    if syntax.mysql and "\\" in text:
        yield _tokens(text, syntax, backslashes=False)


def _spelled(token: _Token, syntax: Syntax) -> str:
    return token.text.lower() if syntax.folds and token.kind == "word" else token.text


# -- columns ---------------------------------------------------------------------------------------------------------

# What no database takes for a column where it has neither quotes nor a table before it.
_RESERVED = frozenset((
    "all", "and", "as", "asc", "between", "by", "case", "check", "collate", "create", "cross", "default",
    "delete", "desc", "distinct", "else", "exists", "foreign", "from", "group", "having", "in", "inner",
    "insert", "into", "is", "join", "left", "like", "limit", "not", "null", "on", "or", "order", "outer",
    "primary", "references", "right", "select", "set", "table", "then", "to", "union", "unique", "update",
    "using", "values", "when", "where", "with",
))  # fmt: skip


def columns_in(text: str, syntax: Syntax) -> set[Name]:
    """The names in a text that may be those of columns, each with the table or alias before it."""
    found: set[Name] = set()
    for tokens in _readings(text, syntax):
        padded = [_NONE, _NONE, *tokens, _NONE]
        for first, before, token, after in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
            if token.kind not in ("word", "quoted") or after.kind in (".", "("):
                continue  # a table or a schema, or a function
            if before.kind == ".":
                found.add(Name(_spelled(token, syntax), _spelled(first, syntax)))
            elif not _is_no_column(before, token, after):
                found.add(Name(_spelled(token, syntax)))
    return found


def _is_no_column(before: _Token, token: _Token, after: _Token) -> bool:
    """Whether a name without a table before it is a keyword, an alias, a unit or a type."""
    if before.word == "as" or (before.kind in ("literal", "double") and token.kind == "word"):
        return True  # 1 AS mrn, INTERVAL 1 year
    if token.kind == "quoted":
        return False
    return token.word in _RESERVED or after.kind == "literal" or (before.kind == "(" and after.word == "from")


# -- tables ----------------------------------------------------------------------------------------------------------

# Statements that are left alone: DDL, and what only inspects.
_LEFT_ALONE = frozenset((
    "alter", "check", "cluster", "comment", "create", "desc", "describe", "drop", "grant", "lock", "optimize",
    "pragma", "refresh", "reindex", "rename", "repair", "revoke", "show", "truncate", "unlock", "vacuum",
))  # fmt: skip
_BODIES = frozenset(
    ("event", "function", "package", "procedure", "trigger")
)  # ; does not end their statement
_FIRST = frozenset(("copy", "handler", "insert", "merge", "replace"))  # a table may stand right behind them
_VERBS = frozenset(("delete", "insert", "merge", "replace", "select", "update"))
_OPENING = frozenset(("from", "into", "join", "straight_join", "table", "update", "using"))
_PASSED = frozenset((
    "abort", "concurrent", "delayed", "fail", "high_priority", "ignore", "lateral", "local", "low_priority",
    "only", "or", "quick", "replace", "rollback",
))  # fmt: skip
_ENDING = frozenset((
    "connect", "except", "fetch", "for", "group", "having", "intersect", "limit", "offset", "on", "order",
    "qualify", "returning", "select", "set", "union", "values", "when", "where", "window",
))  # fmt: skip
_NOT_BEHIND = {  # the words after which an opening one is none
    "from": {"distinct"},
    "update": {"do", "for", "key", "on"},
}
_BEFORE_TABLE = frozenset(("", "all", "as", "distinct", "except", "explain", "intersect", "into", "union"))
_TAKING_FROM = frozenset(("extract", "overlay", "position", "substr", "substring", "trim"))  # functions


@dataclass
class _Level:
    """What is open within one pair of parentheses."""

    called: str = ""  # the function whose arguments it has
    expects: bool = False  # a table comes next
    lists: bool = False  # a comma leads to another
    opened: str = ""  # the word that said so
    names: str = ""  # what of WITH is being read: "name", "body", or "end"
    recursive: bool = False
    body_of: str | None = None  # the CTE whose body it is
    ctes: set[str] = field(default_factory=set)


def tables_in(text: str, syntax: Syntax, *, fragment: bool = False, in_from: bool = False) -> set[Name]:
    """The names in a text that stand where a table can, each with the schema before it.

    :param fragment: it is a part of a statement.
    :param in_from: a part of its FROM, which may begin with a table.
    """
    found: set[Name] = set()
    for tokens in _readings(text, syntax):
        found.update(_Tables(tokens, syntax, fragment, in_from).read())
    return found


def written_in(text: str, syntax: Syntax) -> dict[Name, bool]:
    """The tables that get rows or values by a statement's text, and whether all of their columns may."""
    found: dict[Name, bool] = {}
    for tokens in _readings(text, syntax):
        reading = _Tables(tokens, syntax, fragment=False, in_from=False)
        for _ in reading.read():
            pass
        found.update(reading.written)
    return found


class _Tables:
    """One reading of a text.

    :ivar written: the tables that get rows or values, of those that were read so far; True where no columns are named.
    """

    def __init__(self, tokens: Sequence[_Token], syntax: Syntax, fragment: bool, in_from: bool) -> None:
        self._tokens, self._syntax, self._fragment = tokens, syntax, fragment
        self._levels = [_Level(expects=in_from, lists=in_from)]
        self._first = ""  # the first word of the statement, or its verb
        self.written: dict[Name, bool] = {}

    def _at(self, index: int) -> _Token:
        return self._tokens[index] if 0 <= index < len(self._tokens) else _NONE

    def read(self) -> Iterator[Name]:
        """The tables."""
        index = 0
        while index < len(self._tokens):
            token, level = self._tokens[index], self._levels[-1]
            if token.word and not self._first and not self._fragment and token.word in _LEFT_ALONE:
                index = self._behind(index)
                continue
            if not self._first or (token.word in _VERBS and len(self._levels) == 1):
                self._first = self._first if self._first in _VERBS else token.word
            if token.kind in ("(", ")", ",", ";"):
                self._sign(index, token.kind)
            elif token.is_name and level.names == "name" and token.word != "recursive":
                self._cte(index)
            elif token.word and self._keyword(index, token.word):
                pass
            elif token.is_name and level.expects:
                index, name = self._table(index)
                if name is not None:
                    yield name
            index += 1

    def _behind(self, index: int) -> int:
        """The place behind a statement that is left alone."""
        rest = self._tokens[index:]
        if any(token.word in _BODIES for token in rest[:12]) and rest[0].word == "create":
            return len(self._tokens)
        return index + next((number for number, token in enumerate(rest) if token.kind == ";"), len(rest)) + 1

    def _sign(self, index: int, sign: str) -> None:
        level, before = self._levels[-1], self._at(index - 1)
        if sign == "(":
            new = _Level(before.word, level.expects, level.expects, level.opened)
            level.expects = False
            if level.names == "body" and before.word in ("as", "materialized"):
                new.body_of, level.names = level.body_of, "end"
            self._levels.append(new)
        elif sign == ")" and len(self._levels) > 1:
            closed = self._levels.pop()
            if closed.body_of is not None:
                self._levels[-1].ctes.add(closed.body_of)
        elif sign == ",":
            level.expects = level.lists
            if level.names == "end":
                level.names = "name"
        elif sign == ";":
            self._levels, self._first = [_Level()], ""

    def _cte(self, index: int) -> None:
        level, name = self._levels[-1], self._tokens[index].text.lower()
        level.names = "body"
        # The body of a CTE takes its name for that of a table, but where it is recursive.
        if level.recursive:
            level.ctes.add(name)
        # Kept here until its parenthesis opens.
        level.body_of = name

    def _keyword(self, index: int, word: str) -> bool:
        """Whether a word is a keyword here; it then changes what is expected."""
        level = self._levels[-1]
        if word == "with":
            level.names, level.recursive = "name", self._at(index + 1).word == "recursive"
        elif self._opens(index, word):
            level.expects, level.lists, level.names, level.opened = True, True, "", word
        elif word in _ENDING:
            level.expects = False
            level.lists = level.lists and word == "on"
            level.names = "" if level.names != "body" else "body"
        else:
            return word in _PASSED and level.expects and self._at(index + 1).is_name
        return True

    def _opens(self, index: int, word: str) -> bool:
        """Whether a table comes next."""
        before, after = self._at(index - 1), self._at(index + 1)
        if word in _FIRST:
            return word == self._first and before.kind in ("", ";") and after.kind != "("
        if word not in _OPENING or before.kind == "." or after.kind in (".", ","):
            return False
        if word == "from" and self._levels[-1].called in _TAKING_FROM:
            return False
        if word == "table":
            return before.word in _BEFORE_TABLE and before.kind in ("", "word", "(", ")", ";")
        if word == "using" and after.kind == "(":
            return self._first in ("delete", "merge")
        return before.word not in _NOT_BEHIND.get(word, ())

    def _table(self, index: int) -> tuple[int, Name | None]:
        """The table whose name begins here, and where it ends; None for a function or a CTE."""
        level, before = self._levels[-1], None
        while self._at(index + 1).kind == "." and self._at(index + 2).is_name:
            before = _spelled(self._tokens[index], self._syntax)
            index += 2
        level.expects = False
        name = Name(_spelled(self._tokens[index], self._syntax), before)
        if level.opened in {*_FIRST, "into", "update"}:
            names_columns = self._at(index + 1).kind == "(" and self._at(index + 2).word not in (
                "select",
                "with",
            )
            self.written[name] = level.opened != "update" and not names_columns
            return index, name  # what is written to is no function, nor a CTE
        if (level.opened, self._first) == ("from", "delete"):
            return index, name  # likewise
        is_cte = before is None and any(name.name.lower() in each.ctes for each in self._levels)
        return index, None if is_cte or self._at(index + 1).kind == "(" else name
