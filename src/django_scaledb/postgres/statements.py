"""What is to be run, as values: statements with the locks they take, grouped into steps.

A `Step` is the unit of progress: it is either done or not done, and a run that dies between two
steps leaves a partition set that is valid. Building steps touches no database; the executor is
the only code that runs them, and ``--dry-run`` prints them.
"""

from __future__ import annotations

from dataclasses import dataclass

from psycopg import sql

from django_scaledb.postgres.locks import Lock


@dataclass(frozen=True)
class Statement:
    """One SQL statement and the strongest lock it takes on each table it touches."""

    query: sql.Composable
    locks: tuple[Lock, ...] = ()


@dataclass(frozen=True)
class Step:
    """Statements that belong together.

    `summary` completes the sentence "cannot ..." ("attach partition public.upload_y2026").
    A transactional step runs in one transaction; the others (DETACH .. CONCURRENTLY) hold one
    statement, which PostgreSQL refuses inside a transaction.

    `nowait` names the locks that would make other clients queue behind us while we wait for them
    (SHARE ROW EXCLUSIVE on the target of a foreign key, ACCESS EXCLUSIVE anywhere). The executor
    asks for them with NOWAIT before anything else and tries again later, so that nobody ever
    stands behind a lock that we do not have yet.

    `ahead` are statements that change nothing and take locks that LOCK TABLE cannot take (a view's),
    before those of `nowait`: in the order in which other clients come to them. Each is waited for as
    long as a lock for which others queue.

    With `together` the statements are sent as one text: what counts is how long the locks are held,
    and a network's way there and back for each statement would be most of that.
    """

    summary: str
    statements: tuple[Statement, ...]
    transactional: bool = True
    nowait: tuple[Lock, ...] = ()
    ahead: tuple[Statement, ...] = ()
    together: bool = False

    def __post_init__(self) -> None:
        if not self.transactional and len(self.statements) != 1:
            raise ValueError("a step outside a transaction holds exactly one statement")

    @property
    def locks(self) -> tuple[Lock, ...]:
        """The strongest lock on each table, over all statements, in the order first met."""
        strongest: dict[object, Lock] = {}
        for lock in (*self.nowait, *(lock for s in (*self.ahead, *self.statements) for lock in s.locks)):
            held = strongest.get(lock.table)
            if held is None or held.mode < lock.mode:
                strongest[lock.table] = lock
        return tuple(strongest.values())
