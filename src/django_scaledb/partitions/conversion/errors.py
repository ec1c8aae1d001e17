"""What a conversion raises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from django_scaledb.exceptions import DDLError
from django_scaledb.postgres.identifiers import TableName


@dataclass(frozen=True)
class Obstacle:
    """Why a table cannot be converted, and what can be done about it."""

    reason: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.reason}; {self.way_out}"


class ConversionRefused(DDLError):
    """The table has something that cannot be carried over; nothing was touched."""

    def __init__(self, table: TableName, obstacles: Sequence[Obstacle]) -> None:
        self.obstacles = tuple(obstacles)
        lines = "".join(f"\n  - {obstacle}" for obstacle in self.obstacles)
        super().__init__(f"{table} cannot be converted, and nothing was touched:{lines}")


class TableChanged(DDLError):
    """The table was altered while its conversion was under way."""
