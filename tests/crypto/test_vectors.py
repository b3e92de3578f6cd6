"""The frozen vectors: stored data of format 1 opens for ever."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

VECTORS = Path(__file__).parent.parent / "vectors"

PUBLISHED = {
    "tk_id": "3074277ddbe0bdfffab035d8e211f6a2",
    "payload": "01202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f"
    "39ef72e92050289b9303324cd2bf43bab47846ba9526dc894b662eeb4a1afd15",
    "key_id": "1164474e8e6afd2de4e8ab22fc07db05",
    "sealed data-key": "b201a0a1a2a3a4a5a6a7a8a9aaab9bbb2d7751764b79d2c23b3a3f73b5dc0b8b"
    "ab088f95cfb03a9e288a24960078e3546102f7890fb5a2d2e97f94180296",
    "salt_id": "c65aee1be7bebc7575398b3bc79357e2",
    "sealed search-salt": "b201a0a1a2a3a4a5a6a7a8a9aaabdaf86c3010350a3693817a7d7e30f4834ac8"
    "ea4fced68eff7bdd53f35bef7b016dc31258a1c42bbf252d0d2180017d8b",
    "manifest_tag": "19053f343fa7f2d7e7a1c3816080a786d6b11fc00cf23f4470d504d1c0fcce71",
    "value_key": "2785404bb92dd4dd33c058a82a28d465a47dcf92a5844101060094039cd9cfdf",
    "value": "b1011164474e8e6afd2de4e8ab22fc07db05a0a1a2a3a4a5a6a7a8a9aaab"
    "4a0f55704d14afcb67758f4f62407ab6a807f4",
    "column_salt sha256 column": "QNVclrEanisRlljMnrpDLT8Rk68in4iF",
    "search_hash sha256 column": "ac18a85a0c10968e59665c81e9024432dae178cfd538f72d6e4ca82ab3244542",
    "search_hash sha256 tenant": "a54cd9116455aa5d9de01c9164801c3a418396d95eb9668534375c66685bca17",
    "search_hash hmac-sha256 column": "65119468b977852e83682f18e9f225c1b8d532e60429ede537115a97fc8ee08e",
    "row_tag": "474e34cbdaac0a886808a1c55d7127b234d33dde3770e1ec0bd53b4741637c75",
}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"vectors_{name}", VECTORS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_library_makes_the_frozen_vectors() -> None:
    """A change of any byte of the formats is noticed."""
    assert load("generate").render() == (VECTORS / "format1.json").read_text(encoding="utf-8")


def test_an_independent_implementation_agrees() -> None:
    """The vectors follow from the description of the formats, not from this code alone."""
    count = len(json.loads((VECTORS / "format1.json").read_text(encoding="utf-8"))["vectors"])
    assert load("verify").verify(VECTORS / "format1.json") == count > 100


def test_verify_uses_nothing_of_the_library() -> None:
    """The second implementation stays a second one."""
    source = (VECTORS / "verify.py").read_text(encoding="utf-8")
    assert "import sqla_byok" not in source
    assert "from sqla_byok" not in source


def test_verify_finds_a_wrong_vector(tmp_path: Path) -> None:
    """The check can fail."""
    text = (VECTORS / "format1.json").read_text(encoding="utf-8")
    wrong = tmp_path / "wrong.json"
    wrong.write_text(text.replace(PUBLISHED["row_tag"], "00" * 32), encoding="utf-8")
    with pytest.raises(AssertionError, match="row_tag"):
        load("verify").verify(wrong)


def test_the_published_vector_is_among_them() -> None:
    """The file holds what the format's description publishes, whatever it was generated from."""
    frozen: dict[str, str] = {}
    for vector in json.loads((VECTORS / "format1.json").read_text(encoding="utf-8"))["vectors"]:
        inputs = vector["in"]
        kind = [inputs[name] for name in ("kind", "hash", "scope") if name in inputs]
        if inputs.get("tenant") == "org-42":
            frozen.setdefault(" ".join([vector["op"], *kind]), vector["out"])
    assert {name: frozen[name] for name in PUBLISHED} == PUBLISHED
