"""Three demo adapters (sql, code, poetry): their tasks, their weights and what made them."""

from __future__ import annotations

from pathlib import Path

from adapters.demo import code, poetry, sql
from adapters.demo.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (sql.TASK, code.TASK, poetry.TASK)}
WEIGHTS = Path(__file__).parent / "weights"
