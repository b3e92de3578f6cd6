"""docs/outcomes.md tells what the code does: every outcome, its codes and who must act."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sqla_byok import errors, kms
from sqla_byok.errors import KeystoreError, KmsError, KmsNoAnswerError, KmsRefusedError

PAGE = (Path(__file__).parent.parent / "docs" / "outcomes.md").read_text(encoding="utf-8")
# Abstract: every "no answer" is one of its kinds, while an unlisted "no" is a KmsRefusedError itself.
OUTCOMES = sorted(
    name
    for name in errors.__all__
    if issubclass(getattr(errors, name), KmsError) and name not in ("KmsError", "KmsNoAnswerError")
)
# Told by more than the code: the operation, the status or the text of the answer.
NOT_IN_A_TABLE = {"BadParameter"}


def tables() -> Iterator[tuple[str | None, Any]]:
    """Every meaning in the providers' modules, with the code it stands under where it stands in a table."""
    for module in pkgutil.iter_modules(kms.__path__, f"{kms.__name__}."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, dict):
                yield from ((code, each) for code, each in value.items() if hasattr(each, "action_by"))
            elif isinstance(value, tuple) and hasattr(value, "action_by"):
                yield None, value


def section(outcome: str) -> str:
    return PAGE.partition(f"\n### {outcome}\n")[2].partition("\n#")[0]


def row(outcome: str) -> list[str]:
    """The cells of the outcome's row in the table of all outcomes."""
    (line,) = re.findall(rf"^\| \[`{outcome}`\]\(#{outcome.lower()}\) \|(.*)\|$", PAGE, re.MULTILINE)
    return [cell.strip() for cell in line.split("|")]


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_every_outcome_is_told(outcome: str) -> None:
    """An operator who meets an exception at night finds its row, its codes at both clouds and what to do."""
    assert len(row(outcome)) == 4
    for part in ("- AWS:", "- Azure:", "- What to do:"):
        assert part in section(outcome)


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_the_page_says_who_acts_as_the_code_does(outcome: str) -> None:
    """Nobody waits for the customer where the code says that it is our turn, or the other way round."""
    told = set(row(outcome)[-1].split(", "))
    coded = {each.action_by for _, each in tables() if each.error.__name__ == outcome}
    assert coded
    assert coded <= told <= {"customer", "operator"}
    if hasattr(kms, "AzureKeyVault"):
        assert coded == told


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_running_work_goes_on_only_without_an_answer(outcome: str) -> None:
    """The page keeps "no" and "no answer" apart as the tree of exceptions does."""
    running = row(outcome)[1]
    assert running == ("goes on" if issubclass(getattr(errors, outcome), KmsNoAnswerError) else "ends")


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_the_codes_mean_what_the_page_says(outcome: str) -> None:
    """A provider's code that the page lists under an outcome raises that outcome."""
    known: dict[str, set[str]] = defaultdict(set)
    for code, each in tables():
        if code is not None:
            known[code].add(each.error.__name__)
    clouds = ["AWS", "Azure"] if hasattr(kms, "AzureKeyVault") else ["AWS"]
    for cloud in clouds:
        listed = section(outcome).partition(f"- {cloud}:")[2].partition("\n- ")[0]
        for code in re.findall(r"`(?:AADSTS)?(\w+)`", listed):
            if code in NOT_IN_A_TABLE or (outcome == "KeyDeletedError" and "KeyDisabledError" in known[code]):
                continue  # the same code, told apart by the message
            if outcome == "AccessDeniedError" and "CredentialInvalidError" in known[code]:
                continue  # what it means depends on whose credential signed
            assert outcome in known[code], code


def test_the_keystores_outcomes_are_told() -> None:
    """The keystore's exceptions, a tenant that is not there and keys that ended have their place, too."""
    names = [
        name
        for name in errors.__all__
        if issubclass(getattr(errors, name), KeystoreError) and name != "KeystoreError"
    ]
    for name in [*names, "UnknownTenantError"]:
        assert re.search(rf"^\| `{name}` \|", PAGE, re.MULTILINE), name
    assert "`KeysExpiredError`" in PAGE.partition("\n## Time\n")[2]


def test_no_other_outcome_is_made_up() -> None:
    """Every exception that the page names can be imported."""
    named = set(re.findall(r"`(\w+Error)`", PAGE)) - {
        "UnauthorizedSSOTokenError",
        "NoCredentialsError",
        "ProxyConnectionError",
    }
    assert named <= set(errors.__all__)
    assert set(OUTCOMES) < named
    assert all(issubclass(getattr(errors, name), KmsRefusedError | KmsNoAnswerError) for name in OUTCOMES)
