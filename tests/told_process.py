"""A process that does what its parent tells it through a pipe, as its parent sees it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

__all__ = ["WAKE", "ToldProcess"]

SPAWN = multiprocessing.get_context("spawn")
WAKE = "wake"


class ToldProcess:
    """Runs ``target(*arguments, pipe)``, which answers each ``(name, *arguments)`` of the pipe and ends at None."""

    patience = 60.0  # seconds that an answer may take

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        self.pipe, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=target, args=(*arguments, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def start(self, name: str, *arguments: Any) -> None:
        self.pipe.send((name, *arguments))

    def answer(self) -> Any:
        """What it says next; an exception that it answers with is raised."""
        assert self.pipe.poll(self.patience), "the other process does not answer"
        answer = self.pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def do(self, name: str, *arguments: Any) -> Any:
        self.start(name, *arguments)
        return self.answer()

    def wake(self) -> None:
        self.pipe.send(WAKE)

    def kill(self) -> None:
        self.process.kill()
        self.process.join(30)

    def close(self) -> None:
        """Have it end by itself, unless it was killed."""
        if self.process.exitcode is None:
            self.pipe.send(None)
            self.process.join(30)
            assert self.process.exitcode == 0
