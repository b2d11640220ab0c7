"""The log of a run, a line a step, for whoever must find out where a process that was killed had got to."""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from halve.memory import peak_memory
from halve.run.events import Progress

LOG = "log.jsonl"


class RunLog:
    """Appends a line of JSON at every step and flushes it: phase, block, matrix, UTC time, peak memory so far.

    A line that cannot be written is left out: the log is never a reason to stop.

    Args:
        directory: that of the run, which is there already; earlier lines stay.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / LOG

    def __call__(self, step: Progress) -> None:
        """Write down one step."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "phase": step.phase,
            "block": step.block,
            "matrix": None if step.matrix is None else step.matrix.name,
            "relative_loss": None if step.matrix is None else step.matrix.facts.get("relative_loss"),
            "peak_memory_gb": round(peak_memory() / 1e9, 3),
        }
        with suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
