"""How often the way of a statement changes file, by benchmarks/walk.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "walk.py"


def test_a_statement_can_be_followed() -> None:
    """Whoever looks into a wrong statement would get lost where its way changes file ever more often."""
    run = subprocess.run(
        [sys.executable, SCRIPT, "--walks-only", "--json"], check=True, capture_output=True, text=True
    )
    walks = json.loads(run.stdout)["walks"]
    assert list(walks) == ["INSERT", "SELECT", "search"]
    for name, walk in walks.items():
        assert walk["calls"] >= walk["changes of file"] > 0
        assert walk["changes of file"] <= walk["at most"], (name, walk["files"])
