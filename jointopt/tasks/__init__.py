"""The tasks that a config can name: how data becomes batches, and how a model is scored on them.

A user's own quality function (`quality: my_package.my_function`) needs none of them.
"""

from __future__ import annotations

from jointopt.tasks import causal_lm, image_classification, text_classification
from jointopt.tasks.task import Task

TASKS: dict[str, Task] = {
    task.name: task for task in (text_classification.TASK, image_classification.TASK, causal_lm.TASK)
}

__all__ = ["TASKS", "Task"]
