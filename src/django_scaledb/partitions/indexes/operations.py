"""Migration operations that add and remove indexes while the table is in use.

Written by hand into a migration in the place of `AddIndex` and its like, with ``atomic = False``.
"""

from __future__ import annotations

from typing import Any

from django.contrib.postgres import operations as postgres
from django.db import NotSupportedError
from django.db.backends.base.schema import BaseDatabaseSchemaEditor
from django.db.migrations.operations.base import OperationCategory
from django.db.migrations.operations.models import AddConstraint, RemoveConstraint
from django.db.migrations.state import ProjectState
from django.db.models import BaseConstraint, Model, UniqueConstraint


class AddIndexConcurrently(postgres.AddIndexConcurrently):
    """`AddIndex` that stops nobody, on partitioned tables as on plain ones.

    On a partitioned table it makes the index on the table alone, builds it concurrently on each
    partition, and attaches these one by one. A run that was ended goes on when `migrate` is run
    again; what is left of an index that was not finished is dropped and built again. On a plain
    table it is Django's own. Django's `AddIndexConcurrently` does the same with this ENGINE.

    Raises `NotSupportedError` in a migration that does not say ``atomic = False``, and `DDLError`.
    """


class RemoveIndexConcurrently(postgres.RemoveIndexConcurrently):
    """`RemoveIndex` behind which nobody waits for long.

    PostgreSQL cannot drop a partitioned index concurrently: it takes the table and all partitions for
    some milliseconds. That lock is tried again and again with a pause instead of being waited for,
    until ``SCALEDB["DDL_DEADLINE"]``. On a plain table it is Django's own.
    """


class _ConstraintOperation(postgres.NotInTransactionMixin):
    """What adding and removing have in common; their bases are Django's."""

    atomic = False

    def _change(
        self, app_label: str, schema_editor: BaseDatabaseSchemaEditor, state: ProjectState, *, add: bool
    ) -> None:
        self._ensure_not_in_transaction(schema_editor)
        model: type[Model] = state.apps.get_model(app_label, self.model_name)  # type: ignore[attr-defined]
        if not self.allow_migrate_model(schema_editor.connection.alias, model):  # type: ignore[attr-defined]
            return
        name = "add_constraint_concurrently" if add else "remove_constraint_concurrently"
        change = getattr(schema_editor, name, None)
        if change is None:
            raise NotSupportedError(
                f"{type(self).__name__} needs ENGINE django_scaledb.backend on "
                f"{schema_editor.connection.alias!r}"
            )
        change(model, self._constraint(app_label, state))

    def _constraint(self, app_label: str, state: ProjectState) -> UniqueConstraint:
        raise NotImplementedError


class AddConstraintConcurrently(_ConstraintOperation, AddConstraint):
    """`AddConstraint` for a `UniqueConstraint`, built like an index of `AddIndexConcurrently`.

    Works on partitioned tables, where the constraint must contain the partition key, and on plain
    ones. Raises `TypeError` for other constraints: for a check there are Django's
    `AddConstraintNotValid` and `ValidateConstraint`. Rows that are there twice raise `DDLError`,
    and leave nothing that would refuse rows.
    """

    category = OperationCategory.ADDITION

    def __init__(self, model_name: str, constraint: BaseConstraint) -> None:
        if not isinstance(constraint, UniqueConstraint):
            raise TypeError("AddConstraintConcurrently.constraint must be a UniqueConstraint.")
        super().__init__(model_name, constraint)

    def database_forwards(
        self,
        app_label: str,
        schema_editor: BaseDatabaseSchemaEditor,
        from_state: ProjectState,
        to_state: ProjectState,
    ) -> None:
        self._change(app_label, schema_editor, to_state, add=True)

    def database_backwards(
        self,
        app_label: str,
        schema_editor: BaseDatabaseSchemaEditor,
        from_state: ProjectState,
        to_state: ProjectState,
    ) -> None:
        self._change(app_label, schema_editor, from_state, add=False)

    def _constraint(self, app_label: str, state: ProjectState) -> Any:
        return self.constraint

    def describe(self) -> str:
        return f"Concurrently create constraint {self.constraint.name} on model {self.model_name}"


class RemoveConstraintConcurrently(_ConstraintOperation, RemoveConstraint):
    """`RemoveConstraint` of a `UniqueConstraint`, with the lock of `RemoveIndexConcurrently`.

    Raises `TypeError` for other constraints.
    """

    category = OperationCategory.REMOVAL

    def database_forwards(
        self,
        app_label: str,
        schema_editor: BaseDatabaseSchemaEditor,
        from_state: ProjectState,
        to_state: ProjectState,
    ) -> None:
        self._change(app_label, schema_editor, from_state, add=False)

    def database_backwards(
        self,
        app_label: str,
        schema_editor: BaseDatabaseSchemaEditor,
        from_state: ProjectState,
        to_state: ProjectState,
    ) -> None:
        self._change(app_label, schema_editor, to_state, add=True)

    def _constraint(self, app_label: str, state: ProjectState) -> UniqueConstraint:
        constraint = state.models[app_label, self.model_name_lower].get_constraint_by_name(self.name)
        if not isinstance(constraint, UniqueConstraint):
            raise TypeError(f"{self.name} is not a UniqueConstraint: use RemoveConstraint")
        return constraint

    def describe(self) -> str:
        return f"Concurrently remove constraint {self.name} from model {self.model_name}"
