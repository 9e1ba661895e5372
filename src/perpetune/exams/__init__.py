"""Exams: what a model is asked beside the tasks that it learns."""

from __future__ import annotations

from perpetune.exams.base import Exam, Suite, right_answers

__all__ = ["Exam", "Suite", "right_answers"]
