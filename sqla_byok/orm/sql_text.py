"""What SQL text names: tables where a table can stand, and columns where a column can.

No parser: tokens, and the few words of SQL after which a table stands. Where it is unclear, a name counts; a keyword,
a function, an alias after AS, a string or a comment does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

__all__ = [
    "Listed",
    "Name",
    "Syntax",
    "columns_in",
    "computes",
    "explains",
    "lists_columns",
    "name_alone",
    "positions_in",
    "rows_in",
    "tables_in",
    "without_parameters",
    "written_in",
]


class Syntax(NamedTuple):
    """How a database reads text."""

    mysql: bool = False  # backslashes in strings, and # comments
    ansi_quotes: bool = True  # "x" is a name; to MySQL a string, but where its mode says so
    brackets: bool = False  # [x] is a name
    postgresql: bool = (
        False  # $$x$$ is a string, x::y converts, U&"x" is a name, and a table's name stands for its row
    )
    sqlite: bool = False  # 'x' is a name where only a name can stand

    @property
    def folds(self) -> bool:
        """Whether a name without quotes is one in lower case."""
        return self.postgresql

    @classmethod
    def of(cls, dialect: Any) -> Syntax:
        """The syntax of a SQLAlchemy dialect; without one, that of the standard."""
        name = getattr(dialect, "name", "")
        mysql = name in ("mysql", "mariadb")
        return cls(
            mysql=mysql,
            ansi_quotes=not mysql or dialect.identifier_preparer.initial_quote == '"',
            brackets=name in ("sqlite", "mssql"),
            postgresql=name == "postgresql",
            sqlite=name == "sqlite",
        )


class Name(NamedTuple):
    """A name, and what stands before it with a dot: a table's schema, or a column's table."""

    name: str
    before: str | None = None


class _Token(NamedTuple):
    text: str  # of a name: without its quotes
    kind: str  # "word", "quoted", "string", "number", "parameter", "cast"; else a sign
    names: bool = False  # a string that is a name where only a name can stand

    @property
    def is_name(self) -> bool:
        return self.names or self.kind in ("word", "quoted")

    @property
    def word(self) -> str:
        """In lower case, where it may be a keyword; else empty."""
        return self.text.lower() if self.kind == "word" else ""


_NONE = _Token("", "")


@lru_cache(maxsize=16)
def _pattern(syntax: Syntax, backslashes: bool) -> re.Pattern[str]:
    escaped, plain = r"'(?:[^'\\]|''|\\.)*'", r"'(?:[^']|'')*'"
    strings = [escaped] if backslashes else [plain]
    quoted = [r"`(?:[^`]|``)+`"]
    double = r'"(?:[^"\\]|""|\\.)*"' if backslashes else r'"(?:[^"]|"")*"'
    parameters, casts = [r"%\(\w+\)s", r":\w+"], [r"::\s*\w+"]
    if syntax.brackets:
        quoted.append(r"\[[^\]]+\]")
    if syntax.postgresql:
        strings = [f"[eE]{escaped}", f"[uU]&{plain}", plain, r"(?<!\w)\$(?P<tag>\w*)\$.*?\$(?P=tag)\$"]
        quoted.insert(0, rf"[uU]&{double}(?:\s*[uU][eE][sS][cC][aA][pP][eE]\s*'.')?")
    else:
        parameters.append(r"@+\w+")
    if syntax.mysql:  # what it executes in a comment is no comment
        skipped = [r"--(?=\s|$)[^\n]*", r"\#[^\n]*", r"/\*(?!M?!).*?\*/", r"/\*M?!\d*", r"\*/"]
    else:
        skipped = [r"--[^\n]*", r"/\*.*?\*/"]
    kinds = {
        "skipped": [r"\s+", *skipped],
        "string": strings,
        "cast": casts,
        "parameter": parameters,
        "number": [r"(?<![\w.])\d[\w.]*"],
        "quoted": quoted,
        "double": [double],
        "word": [r"[^\W\d][\w$]*"],
        "sign": ["."],
    }
    return re.compile("|".join(f"(?P<{kind}>{'|'.join(ways)})" for kind, ways in kinds.items()), re.DOTALL)


def _tokens(text: str, syntax: Syntax, backslashes: bool) -> list[_Token]:
    found = []
    for match in _pattern(syntax, backslashes).finditer(text):
        kind, whole = match.lastgroup or "", match[0]
        if kind == "double":
            names = syntax.ansi_quotes
            found.append(_Token(_unquoted(whole), "quoted" if names else "string", names=True))
        elif kind == "quoted":
            found.append(_Token(_unescaped(whole) if whole[0] in "uU" else _unquoted(whole), kind))
        elif kind == "string":
            found.append(_Token(_unquoted(whole) if syntax.sqlite else "", kind, names=syntax.sqlite))
        elif kind != "skipped":
            found.append(_Token(whole, whole if kind == "sign" else kind))
    return found


def _unquoted(whole: str) -> str:
    return whole[1:-1].replace(whole[-1] * 2, whole[-1])


def _unescaped(whole: str) -> str:
    r"""The name that PostgreSQL reads in U&"d\0061ta" UESCAPE '\'."""
    end = whole.rindex('"')
    escape = re.escape(whole[-2] if end < len(whole) - 1 else "\\")
    code = rf"{escape}(?:(?P<same>{escape})|\+(?P<long>[0-9a-fA-F]{{6}})|(?P<short>[0-9a-fA-F]{{4}}))"
    return re.sub(code, _character, whole[3:end].replace('""', '"'))


def _character(match: re.Match[str]) -> str:
    number = int(match["long"] or match["short"] or "0", 16)
    return match["same"] or (chr(number) if number < 0x110000 else match[0])


def _readings(text: str, syntax: Syntax) -> Iterator[list[_Token]]:
    """The text's tokens; on MySQL in both ways, where there is a backslash: the server's mode says what that is."""
    if syntax.postgresql and re.match(r"\s*do\b", text, re.IGNORECASE):
        text = re.sub(r"\$\w*\$", " ", text)  # a block, which is executed
    yield _tokens(text, syntax, backslashes=syntax.mysql)
    if syntax.mysql and "\\" in text:
        yield _tokens(text, syntax, backslashes=False)


def _at(tokens: Sequence[_Token], index: int) -> _Token:
    return tokens[index] if 0 <= index < len(tokens) else _NONE


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


# The words that PostgreSQL takes for a value of its own where they have no quotes: no table has such a name.
_VALUES = frozenset((
    "current_catalog", "current_date", "current_role", "current_time", "current_timestamp", "current_user", "false",
    "localtime", "localtimestamp", "session_user", "system_user", "true", "user",
))  # fmt: skip
# What makes something else of a string behind it: date '2000-01-01'. Behind anything else MySQL and SQLite take a
# string for an alias.
_TYPED = frozenset(("b", "date", "interval", "n", "time", "timestamp", "x"))


def columns_in(text: str, syntax: Syntax, *, in_from: bool = False) -> set[Name]:
    """The names in a text that may be those of columns, each with the table or alias before it.

    :param in_from: it is a part of a FROM, which may begin with a table.
    """
    found: set[Name] = set()
    for tokens in _readings(text, syntax):
        for place in _columns(tokens, syntax, in_from):
            dotted = _at(tokens, place - 1).kind == "."
            table = _spelled(_at(tokens, place - 2), syntax) if dotted else None
            found.add(Name(_spelled(tokens[place], syntax), table))
    return found


def _columns(tokens: Sequence[_Token], syntax: Syntax, in_from: bool) -> Iterator[int]:
    tables = _Tables(tokens, syntax, fragment=True, in_from=in_from).places()
    for place, token in enumerate(tokens):
        if place in tables or _at(tokens, place + 1).kind in (".", "("):
            continue  # a table or a schema, or a function
        if _at(tokens, place - 1).kind == ".":
            if token.is_name:
                yield place
        elif token.kind in ("word", "quoted") and not _is_no_column(tokens, place, syntax):
            yield place


def _is_no_column(tokens: Sequence[_Token], place: int, syntax: Syntax) -> bool:
    """Whether a name without a table before it is a keyword, an alias, a unit or a type."""
    before, token, after = (_at(tokens, each) for each in (place - 1, place, place + 1))
    if before.word == "as" or (before.kind in ("string", "number", "parameter") and token.kind == "word"):
        return True  # 1 AS mrn, INTERVAL 1 year
    if token.kind == "quoted":
        return False
    if before.kind == "(" and after.word == "from":  # EXTRACT(year FROM x)
        return _at(tokens, place - 2).word == "extract" or token.word in ("both", "leading", "trailing")
    if after.kind == "number":
        return True
    if after.kind in ("string", "parameter"):
        return syntax.postgresql or token.word in _TYPED or token.word in _RESERVED
    return token.word in _RESERVED


def rows_in(text: str, syntax: Syntax, *, in_from: bool = False) -> dict[str, bool]:
    """The names in a text that may be those of tables, aliases or subqueries and then stand for whole rows.

    :returns: by name, whether it can be nothing else: a name without ``.*`` may be a column's.
    """
    found: dict[str, bool] = {}
    for tokens in _readings(text, syntax):
        for place in _columns(tokens, syntax, in_from) if syntax.postgresql else ():
            if _at(tokens, place - 1).kind != "." and tokens[place].word not in _VALUES:
                found.setdefault(_spelled(tokens[place], syntax), False)
        for place, token in enumerate(tokens):
            if token.is_name and [_at(tokens, place + step).kind for step in (1, 2)] == [".", "*"]:
                found[_spelled(token, syntax)] = True
    return found


class Listed(NamedTuple):
    """What a text that is selected stands for.

    :ivar every: all columns there are.
    :ivar several: more than one column.
    """

    every: bool
    several: bool


def lists_columns(text: str, syntax: Syntax) -> Listed:
    """What a text stands for where it is selected."""
    every = several = False
    for tokens in _readings(text, syntax):
        depth = 0
        for place, token in enumerate(tokens):
            depth += {"(": 1, ")": -1}.get(token.kind, 0)
            before, after = _at(tokens, place - 1), _at(tokens, place + 1)
            several = several or (token.kind == "," and depth == 0) or (token.kind, before.kind) == ("*", ".")
            starts = before.kind in ("", ",") or before.word in ("select", "distinct", "all")
            every = every or (token.kind == "*" and starts and after.kind in ("", ",", ")", "word"))
    return Listed(every, every or several)


def name_alone(text: str, syntax: Syntax) -> str | None:
    """The name, where an ORDER BY consists of a name and how to sort by it; else None."""
    for tokens in _readings(text, syntax):
        rest = {token.word for token in tokens[1:]}
        if (
            tokens
            and tokens[0].kind in ("word", "quoted")
            and rest <= {"asc", "desc", "nulls", "first", "last"}
        ):
            return _spelled(tokens[0], syntax)
    return None


# The words by which a text does more than to say what is to be done with the one statement within it.
_COMPUTING = frozenset((
    "as", "by", "create", "delete", "distinct", "except", "insert", "intersect", "into", "join", "merge", "order",
    "over", "replace", "select", "set", "union", "update", "values", "where", "with",
))  # fmt: skip
_EXPLAINING = frozenset(("analyze", "desc", "describe", "explain"))


def computes(text: str, syntax: Syntax) -> bool:
    """Whether what stands before or behind a statement makes something else of its rows."""
    return any(token.word in _COMPUTING for tokens in _readings(text, syntax) for token in tokens)


def explains(text: str, syntax: Syntax) -> bool:
    """Whether a statement asks how another one would run: it does not return that one's rows."""
    return any(tokens[0].word in _EXPLAINING for tokens in _readings(text, syntax) if tokens)


# -- positions -------------------------------------------------------------------------------------------------------

_PARAMETER = re.compile(r"%\(\w+\)s|%s|\$\d+|\?|__\[POSTCOMPILE_.*?\]")
# What a position may stand in: SQLite looks through likely() and its like, PostgreSQL groups by ROLLUP (1, 2).
_AROUND_POSITIONS = frozenset(("cube", "likelihood", "likely", "rollup", "sets", "unlikely"))


def without_parameters(rendered: str) -> str:
    """A text that was rendered for a driver, with its parameters in a form that is told from all else."""
    return _PARAMETER.sub(" :p ", rendered)


def positions_in(text: str, syntax: Syntax, *, clause: bool = False) -> list[int | None]:
    """The positions of result columns that an ORDER BY, GROUP BY or DISTINCT ON may be by; None for an unknown one.

    :param clause: the text is no list of what to sort or group by, but may have one: behind ORDER BY, say.
    """
    return [place for tokens in _readings(text, syntax) for place in _positions(tokens, clause)]


def _positions(tokens: Sequence[_Token], clause: bool) -> Iterator[int | None]:
    levels = [not clause]  # whether items of a list stand here, by the parentheses that are open
    starts = True  # an item begins here
    for place, token in enumerate(tokens):
        after = _at(tokens, place + 1).kind
        if token.kind == "(":
            levels.append(_is_list(tokens, place, levels[-1], starts))
            starts = True
        elif token.kind == ")":
            levels = levels[:-1] or [False]
            starts = False
        elif clause and len(levels) == 1 and token.word in {"by", *_ENDING}:
            levels[0] = starts = token.word == "by" and _at(tokens, place - 1).word in ("order", "group")
        elif token.kind in (",", "+", "-"):
            starts = starts or token.kind == ","
        else:
            if starts and levels[-1] and after in ("", ",", ")", "word", "cast", ";"):
                yield from _position(token)
            starts = False


def _is_list(tokens: Sequence[_Token], place: int, listed: bool, starts: bool) -> bool:
    """Whether the parenthesis at a place has positions within, as that around it has them."""
    word = _at(tokens, place - 1).word
    if (word, _at(tokens, place - 2).word) == ("on", "distinct"):
        return True
    return listed and (starts or word in _AROUND_POSITIONS)


def _position(token: _Token) -> Iterator[int | None]:
    if token.kind == "parameter":
        yield None
    elif token.word == "true":  # MariaDB takes it for 1
        yield 1
    elif token.kind == "number":
        for base in (10, 0):  # 02, and 0x2
            with suppress(ValueError):
                yield int(token.text, base)
                break


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
    cte: str | None = None  # the one whose body comes next
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
        return _at(self._tokens, index)

    def places(self) -> set[int]:
        """Where the tables stand, by the place of the last part of their names."""
        return {index for index, _ in self._read()}

    def read(self) -> Iterator[Name]:
        """The tables."""
        return (name for _, name in self._read())

    def _read(self) -> Iterator[tuple[int, Name]]:
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
                    yield index, name
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
                new.body_of, level.names = level.cte, "end"
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
        level, name = self._levels[-1], self._called(_spelled(self._tokens[index], self._syntax))
        level.names = "body"
        # The body of a CTE takes its name for that of a table, but where it is recursive.
        if level.recursive:
            level.ctes.add(name)
        level.cte = name

    def _called(self, name: str) -> str:
        """What is equal for two names of one CTE; MySQL has settings by which case counts."""
        return name if self._syntax.postgresql or self._syntax.mysql else name.lower()

    def _keyword(self, index: int, word: str) -> bool:
        """Whether a word is a keyword here; it then changes what is expected."""
        level = self._levels[-1]
        if word == "with":
            level.names, level.recursive = "name", self._at(index + 1).word == "recursive"
        elif self._opens(index, word):
            level.expects, level.lists, level.names, level.opened = (
                True,
                level.lists or word != "in",
                "",
                word,
            )
        elif word in _ENDING:
            level.expects = False
            level.lists = level.lists and word == "on"
            level.names = "" if level.names != "body" else "body"
        else:
            return level.expects and self._is_passed(index, word)
        return True

    def _is_passed(self, index: int, word: str) -> bool:
        """Whether a word that stands before a table is no table itself."""
        after = self._at(index + 1)
        if self._at(index - 1).kind == "{":  # MySQL's {oj patient LEFT JOIN …}
            return True
        if word == "only" and self._syntax.postgresql:
            return True  # also before a parenthesis; it is no function's name
        return word in _PASSED and (after.is_name or self._begins_with_dot(after))

    def _begins_with_dot(self, token: _Token) -> bool:
        """Whether a table's name may begin here with the dot behind a keyword, as MySQL's does: FROM .patient."""
        return token.kind == "." and self._syntax.mysql

    def _opens(self, index: int, word: str) -> bool:
        """Whether a table comes next."""
        before, after = self._at(index - 1), self._at(index + 1)
        if word == "in":
            return self._syntax.sqlite and after.is_name
        if word in _FIRST:
            return word == self._first and before.kind in ("", ";") and after.kind != "("
        if word not in _OPENING or before.kind == "." or after.kind == ",":
            return False
        if after.kind == "." and not self._begins_with_dot(after):
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
        is_cte = before is None and any(self._called(name.name) in each.ctes for each in self._levels)
        return index, None if is_cte or self._at(index + 1).kind == "(" else name
