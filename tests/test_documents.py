"""The Python in the README and in docs/ runs as it stands."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from sqlalchemy import Engine

import sqla_byok
from sqla_byok import Byok, errors, testing

ROOT = Path(__file__).parent.parent
DOCUMENTS = ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]

# (document, words of one of its blocks): why that block is only compiled, not run.
NOT_RUN = {
    ("docs/aws.md", "AwsKms(arn))"): "needs a customer's account at AWS",
    ("docs/aws.md", "role_arn="): "needs a customer's account at AWS",
    ("docs/aws.md", "AwsSecretsManagerSalts("): "needs an account at AWS",
    ("docs/migrations.md", "op.create_table("): "runs in a migration",
    ("docs/migrations.md", "op.drop_index("): "runs in a migration",
    ("docs/migrations.md", "context.configure("): "runs in env.py",
    ("docs/migrations.md", "target_metadata = ["): "stands in env.py",
    ("docs/migrations.md", "class Patient(Base)"): "of an application that is not shown",
    ("README.md", "AwsKms("): "needs a customer's account at AWS",
    ("docs/quickstart.md", "AwsKms("): "needs a customer's account at AWS",
}

FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(document: str) -> list[tuple[int, str]]:
    """Each Python block with the line it starts on."""
    content = (ROOT / document).read_text(encoding="utf-8")
    return [(content.count("\n", 0, found.start(1)), found[1]) for found in FENCE.finditer(content)]


def not_run(document: str, block: str) -> bool:
    return any(document == where and words in block for where, words in NOT_RUN)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_blocks_run(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a reader copies works, block after block, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    # a module of its own, since Declarative looks names up in the module of the class
    module = ModuleType("document")
    monkeypatch.setitem(sys.modules, "document", module)
    try:
        for line, block in blocks(document):
            # the blank lines make a traceback name the document's own line
            code = compile("\n" * line + block, document, "exec")
            if not not_run(document, block):
                exec(code, module.__dict__)  # noqa: S102 - running them is the test
    finally:
        for value in list(vars(module).values()):
            if isinstance(value, Engine):
                value.dispose()
            elif isinstance(value, Byok):
                value.close()


@pytest.mark.parametrize(("document", "words"), NOT_RUN)
def test_exceptions_are_still_needed(document: str, words: str) -> None:
    """No block is exempt by accident: each exception names exactly one."""
    assert sum(words in block for _, block in blocks(document)) == 1


def test_there_is_something_to_run() -> None:
    """A change of the fences does not turn these tests off."""
    assert blocks("README.md")


def test_the_reference_has_every_public_name() -> None:
    """A name that users may import is documented; the page on errors takes its own from the module."""
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    shown = {name.removeprefix("sqla_byok.") for name in re.findall(r"^::: (\S+)", page, re.MULTILINE)}
    assert set(sqla_byok.__all__) - set(errors.__all__) <= shown
    assert {f"testing.{name}" for name in testing.__all__} <= shown
    assert "errors" in shown
