"""Writes docs/queries.md from the tests' own tables of forms: what each form does is asked of the library itself.

``pytest tests/orm/test_query_page.py --update-snapshots`` writes the page anew.
"""

from __future__ import annotations

import ast
import html
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from orm import fill_forms, guard_forms, search_forms, test_hash_index, test_search_refused
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from sqla_byok import Byok, UnsupportedQueryError

PAGE = Path(__file__).parents[2] / "docs" / "queries.md"

Row = tuple[str, str, str]

HEADER = """\
# Every query form

<!-- Written by: pytest tests/orm/test_query_page.py --update-snapshots -->

This page is generated from the tables of forms that the tests run. What works gives the same rows as the same query
over plaintext columns, on SQLite, PostgreSQL and MariaDB, where the database has the form. What is refused raises
`UnsupportedQueryError` before anything reaches the database. For an introduction see [Searching](searching.md).

The models: `Patient.mrn`, `nick`, `flag`, `age` and `Visit.mrn`, `code` are searchable, `Patient.mrn` and `Visit.mrn`
with one `salt_scope`; `Patient.sec`, `name` and `doc` are encrypted and not searchable; `id`, `n`, `note` and `plain`
are plaintext. `own` has a salt of its own, `folded` a normalizer, `keyed` another hash algorithm. `Card.initial`,
`Patient.phone_last4` and `fax_last4` are each a `hash_index`.
"""

SECTIONS = {
    "Searches": "`WHERE` as the database is sent it; each comparison is one on the hash column.",
    "Other queries over encrypted columns": "They never depend on the ciphertext.",
    "INSERT, UPDATE and upserts": "Named as in the tests; afterwards every stored hash is that of the stored value.",
    "Refused by the guard": "Each compiled statement is walked once; the error names the column and says what to do.",
    "Refused when it is written": "The column's own operators raise at once.",
    "Refused for its other operand": "These raise when the statement is compiled.",
    "Refused in INSERT and UPDATE": "What cannot be encrypted, or would leave the hash behind.",
}


# -- the code of a form ----------------------------------------------------------------------------------------------


class _Source:
    """The source of the forms in one module, by table and name."""

    def __init__(self, module: Any) -> None:
        self._text = Path(module.__file__).read_text(encoding="utf-8")
        tree = ast.parse(self._text)
        self._named = {
            node.targets[0].id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        self._functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        self._tables: dict[str, dict[str, ast.expr]] = {}
        for node in tree.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict):
                self._tables[ast.unparse(node.target)] = {
                    ast.literal_eval(key): value
                    for key, value in zip(node.value.keys, node.value.values, strict=True)
                    if key is not None
                }

    def code(self, table: str, name: str) -> str:
        """The form as a reader would write it."""
        node = self._tables[table][name]
        start = ""
        while not isinstance(node, ast.Lambda | ast.Name):
            if isinstance(node, ast.Call):
                start = {"_where": "Person", "_index": "Card"}.get(ast.unparse(node.func), start)
                node = node.args[0]
            else:
                node = node.elts[0]  # type: ignore[attr-defined]  # a tuple: what builds it comes first
        code = self._of_function(node.id) if isinstance(node, ast.Name) else self._of_lambda(node)
        for used in re.findall(r"\b_[a-z]\w+(?=\.c\.)", code):
            code = f"{used[1:]} = {self._segment(self._named[used])}; {code.replace(used, used[1:])}"
        return _tidy(f"select({start}).where({code})" if start else code)

    def _of_lambda(self, node: ast.Lambda) -> str:
        called = node.body
        if (
            isinstance(called, ast.Call)
            and isinstance(called.func, ast.Name)
            and called.func.id in self._functions
        ):
            return self._of_function(called.func.id) if called.func.id != "_update" else self._segment(called)
        return self._segment(called)

    def _of_function(self, name: str) -> str:
        body = [node for node in self._functions[name].body if not _is_docstring(node)]
        lines = [self._segment(node.value if isinstance(node, ast.Return) else node) for node in body]  # type: ignore[arg-type]
        return "; ".join(lines)

    def _segment(self, node: ast.AST) -> str:
        return ast.get_source_segment(self._text, node) or ""


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


_SPELLED = {
    r"\*\(column\.label\(f\"(\w+)_\{column\.key\}\"\) for column in with_hash\((\w+), \"(\w+)\"\)\)": (
        r'\2.\3.label("\1_\3"), search_hash(\2.\3).label("\1_\3_hash")'
    ),
    r"\b_coerced\(([\w.]+)\)": r"type_coerce(\1, LargeBinary)",
    r"\b_two_scopes\(p, r\)": (
        'union_all(select(search_hash(p.nick).label("h")), select(search_hash(r.code))).subquery()'
    ),
    r"\b_distinct_on\((.*), R\.id\)": r"\1.distinct(R.id)",
    r"\bA\.": "aliased(P).",
    r"\bg_patient\b": "patient",
    r"\b_hash\(m\.(\w+), \"(\w+)\"\)": r"search_hash(m.\1.\2)",
    r"\*?with_hash\(m\.(\w+), \"(\w+)\"\)": r"m.\1.\2, search_hash(m.\1.\2)",
    r"\b_table\(m\)\.": "Patient.__table__.",
    r"\b(p|r)\.(mrn|id)\.table\b": r"\1.__table__",
    r"\b_update\(p\)": "update(Patient)",
    r"\b(m\.Person|m\.P|_P|P|p|Person)\b(?=[.,)\]])": "Patient",
    r"\b(m\.Visit|m\.R|_R|R|r)\b(?=[.,)\]])": "Visit",
    r"\b(m\.Card|card)\b(?=[.,)\]])": "Card",
    r"\bstart\(": "select(",
    r"\b(SECRET|VALUE)\b": '"x"',
    r"# noqa.*": "",
    r"\s+": " ",
    r"(?<=[(\[]) ": "",
    r",? (?=[)\]])": "",
    r" (?=\.\w)": "",
}


def _tidy(code: str) -> str:
    for pattern, replacement in _SPELLED.items():
        code = re.sub(pattern, replacement, code)
    if applied := re.match(r"\(lambda (\w+): ", code):
        end = _closes(code)
        code = f"{applied[1]} = {code[end + 2 : -1]}; {_tidy(code[applied.end() : end])}"
    while code.startswith("(") and _closes(code) == len(code) - 1:
        code = code[1:-1].strip()
    return code


def _closes(code: str) -> int:
    """Where the parenthesis that opens at the start is closed."""
    depth = 0
    for place, letter in enumerate(code):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0:
            return place
    return -1


# -- what it does ----------------------------------------------------------------------------------------------------


def _found_by(form: search_forms.Form) -> str:
    sql = " ".join(str(form.build(search_forms.ENCRYPTED, select)).split())
    sql = re.sub(r"__\[POSTCOMPILE_(\w+)\]", r":\1, …", sql)
    sql = re.sub(r"\bperson(?=\b|_\d)", "patient", sql)
    sql = re.sub(r"^SELECT \w+\.id(, \w+\.\w+){3} FROM", "SELECT … FROM", sql)
    sql = sql.removeprefix("SELECT card.id, card.holder FROM card ")
    shown = sql[sql.rindex(" FROM patient") if sql.count(" FROM ") == 1 and " FROM patient" in sql else 0 :]
    return f"`{shown.removeprefix(' FROM patient ').strip()}`"


def _refusal(work: Callable[[], Any]) -> str:
    with pytest.raises(UnsupportedQueryError) as raised:
        work()
    message = str(raised.value).removeprefix(f"{raised.value.column}: ")
    return re.sub(r"\b(g_patient|g_visit|p|r|patient)\.(?=[a-z_]+\b)", "", message)


def _searches() -> Iterator[Row]:
    source = _Source(search_forms)
    for name, form in search_forms.FORMS.items():
        yield source.code("FORMS", name), "works", _found_by(form)


def _legal() -> Iterator[Row]:
    source = _Source(guard_forms)
    for name in guard_forms.LEGAL:
        yield source.code("LEGAL", name), "works", "gives the rows that it gives over plaintext"


def _writes() -> Iterator[Row]:
    for group, forms in fill_forms.FORMS.items():
        for form in forms:
            kinds = (
                ""
                if form.kinds == fill_forms.EVERYWHERE
                else f"; on {', '.join(sorted(form.kinds - {'mysql'}))}"
            )
            yield (
                f"{group}: {form.name.replace('_', ' ')}",
                "works",
                f"the value is encrypted, its hash in step{kinds}",
            )


def _guarded(session: Session) -> Iterator[Row]:
    source = _Source(guard_forms)
    both = guard_forms.ENCRYPTED.P, guard_forms.ENCRYPTED.R
    for table in ("REFUSED", "REFUSED_ORM"):
        for name, form in getattr(guard_forms, table).items():
            if name == "DELETE USING":  # SQLite has none
                continue
            why = _refusal(lambda form=form: session.execute(form.build(*both), {"q": "x"}))  # type: ignore[misc]
            yield source.code(table, name), "refused", why


def _written() -> Iterator[Row]:
    source = _Source(test_search_refused)
    for name, write in test_search_refused.WRITTEN.items():
        yield source.code("WRITTEN", name), "refused", _refusal(write)
    of_index = _Source(test_hash_index)
    for name, write in test_hash_index.REFUSED.items():
        yield of_index.code("REFUSED", name), "refused", _refusal(write)


def _compiled() -> Iterator[Row]:
    source = _Source(test_search_refused)
    for name, (build, _, _) in test_search_refused.COMPILED.items():
        statement = select(test_search_refused.P.id).where(build())
        yield source.code("COMPILED", name), "refused", _refusal(statement.compile)
    of_index = _Source(test_hash_index)
    for name, write in test_hash_index.COMPILED.items():
        statement = select(test_hash_index.Person.id).where(write())
        yield of_index.code("COMPILED", name), "refused", _refusal(statement.compile)


def _unwritable(byok: Byok, engine: Engine) -> Iterator[Row]:
    for form in fill_forms.REFUSED:
        if "sqlite" not in form.kinds:
            continue
        with byok.session("t1", engine) as session:
            fill_forms._seed(session)
            run = fill_forms.Run(session, [])
            yield form.name, "refused", _refusal(lambda form=form, run=run: form.work(run))  # type: ignore[misc]


# -- the page --------------------------------------------------------------------------------------------------------


def page(byok: Byok, engine: Engine) -> str:
    """The whole page, from an SQLite engine with the tenant t1."""
    for base in (search_forms.ENCRYPTED.Base, guard_forms.ENCRYPTED.Base, fill_forms.Base):
        base.metadata.create_all(engine)
    with byok.session("t1", engine) as session:
        tables = [_searches(), _legal(), _writes(), list(_guarded(session)), _written(), _compiled()]
    tables.append(_unwritable(byok, engine))
    parts = [HEADER]
    for (title, what), rows in zip(SECTIONS.items(), tables, strict=True):
        head = "What the database is sent" if title == "Searches" else "What happens, or what to do instead"
        lines = [f"| Form | | {head} |", "|---|---|---|"]
        for code, verdict, why in dict.fromkeys(rows):
            shown = code if "UPDATE" in title else _code(code)
            lines.append(f"| {shown} | {verdict} | {_cell(why)} |")
        parts.append(f"## {title}\n\n{what}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def _code(code: str) -> str:
    """As HTML where Markdown's own would break the table."""
    return f"`{code}`" if "|" not in code else f"<code>{html.escape(code).replace('|', '&#124;')}</code>"


def _cell(text: str) -> str:
    return text if text.startswith("`") else html.escape(text, quote=False).replace("|", "&#124;")
