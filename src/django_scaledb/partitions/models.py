"""PartitionedModel: an ordinary model whose table is a partition set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, Self, TypeVar

from django.db import OperationalError, connections, models, router, transaction
from django.db.models import signals
from django.db.models.deletion import Collector

from django_scaledb.partitions.allowance import allow_unpruned
from django_scaledb.partitions.options import PartitionedModelBase, PartitioningOptions

SERIALIZATION_FAILURE = "40001"

T = TypeVar("T")
QS = TypeVar("QS", bound=models.QuerySet[Any])


class PartitionedModel(models.Model, metaclass=PartitionedModelBase):
    """Base class of models whose table PostgreSQL partitions by time.

    Declare how with an inner ``PartitioningMeta`` (``key`` is required)::

        class Upload(PartitionedModel):
            uploaded_at = models.DateTimeField()

            class PartitioningMeta:
                key = ["uploaded_at"]

    ``pk`` stays the scalar ``id``. In the database the primary key is ``(id, key)``, because
    PostgreSQL wants the partition key in every unique index (docs, "Partitioning Limitations");
    with a `UUID7Field` primary key as the key it is ``(id)``.

    An instance remembers the key it was loaded or saved with. `save`, `delete` and
    `refresh_from_db` put it into their WHERE, so that PostgreSQL plans and locks one partition;
    when no row is there any more (it was moved by somebody else, or the move was rolled back) they
    look for the id in all partitions, so that a row is never doubled and never missed.
    """

    _partitioning_meta: PartitioningOptions

    class Meta:
        abstract = True

    @classmethod
    def from_db(cls, db: str | None, field_names: Collection[str], values: Any, **kwargs: Any) -> Self:
        instance = super().from_db(db, field_names, values, **kwargs)
        instance._remember_key()
        return instance

    @classmethod
    def _key_beside_pk(cls) -> models.Field[Any, Any] | None:
        """The partition key's field, or None when the primary key is the partition key."""
        return cls._partitioning_meta.key_beside_pk(cls)

    def _remember_key(self) -> None:
        if (field := self._key_beside_pk()) is not None:
            self._state.stored_key = self.__dict__.get(field.attname)  # type: ignore[attr-defined]

    def _where_it_is(self, queryset: QS) -> Iterator[QS]:
        """`queryset` narrowed to where this row was last known to be, then not narrowed."""
        if (field := self._key_beside_pk()) is not None:
            key = getattr(self._state, "stored_key", None)
            if not _is_plain(key):
                key = self.__dict__.get(field.attname)
            if _is_plain(key):
                yield queryset.filter(**{field.attname: key})
                with allow_unpruned():  # it is not where it was: nothing else is left to do
                    yield queryset
                return
        yield queryset

    def _do_update(  # type: ignore[override]  # its signature differs from one Django to the next
        self, base_qs: Any, using: str, pk_val: Any, values: Any, *args: Any, **kwargs: Any
    ) -> Any:
        # Private to Django, but the one place where save() makes its WHERE (5.2-6.1).
        updated: Any = False
        for queryset in self._where_it_is(base_qs):
            run = partial(super()._do_update, queryset, using, pk_val, values, *args, **kwargs)
            if updated := _following_moves(run, using):
                break
        field = self._key_beside_pk()
        if updated and any(value[0] is field for value in values):
            self._remember_key()
        return updated

    def _do_insert(self, *args: Any, **kwargs: Any) -> Any:
        results = super()._do_insert(*args, **kwargs)  # type: ignore[misc]
        self._remember_key()
        return results

    def delete(self, using: str | None = None, keep_parents: bool = False) -> tuple[int, dict[str, int]]:
        model = type(self)
        if self.pk is None or self._key_beside_pk() is None:
            return super().delete(using=using, keep_parents=keep_parents)
        using = using or router.db_for_write(model, instance=self)
        collector = Collector(using=using, origin=self)
        collector.collect([self], keep_parents=keep_parents)
        counts: Counter[str] = Counter()
        if collector.can_fast_delete(self):
            with transaction.mark_for_rollback_on_error(using=using):
                counts[model._meta.label] += self._delete_row(using)
        else:
            # Django's collector deletes by primary key alone. What hangs on this row stays its
            # work; the row itself is taken from it and deleted last, with its key.
            same_model = set(collector.data.pop(model)) - {self}
            if same_model:
                collector.data[model] = same_model
            with transaction.atomic(using=using, savepoint=False):
                signals.pre_delete.send(sender=model, instance=self, using=using, origin=self)
                counts.update(collector.delete()[1])
                counts[model._meta.label] += self._delete_row(using)
                signals.post_delete.send(sender=model, instance=self, using=using, origin=self)
        setattr(self, model._meta.pk.attname, None)
        return counts.total(), dict(counts)

    delete.alters_data = True  # type: ignore[attr-defined]

    def _delete_row(self, using: str) -> int:
        rows = 0
        for queryset in self._where_it_is(type(self)._base_manager.using(using).filter(pk=self.pk)):
            if rows := _following_moves(partial(queryset._raw_delete, using), using):
                break
        return rows

    def refresh_from_db(
        self,
        using: str | None = None,
        fields: Iterable[str] | None = None,
        from_queryset: models.QuerySet[Self] | None = None,
    ) -> None:
        queryset = from_queryset
        if queryset is None:
            hints: dict[str, models.Model] = {"instance": self}
            queryset = type(self)._base_manager.db_manager(using, hints=hints).all()
        names = None if fields is None else list(fields)
        *narrowed, everywhere = self._where_it_is(queryset)
        for candidate in narrowed:
            try:
                super().refresh_from_db(using=using, fields=names, from_queryset=candidate)
            except type(self).DoesNotExist:
                continue
            break
        else:
            with allow_unpruned() if narrowed else nullcontext():
                super().refresh_from_db(using=using, fields=names, from_queryset=everywhere)
        field = self._key_beside_pk()
        if field is not None and (names is None or field.name in names or field.attname in names):
            self._remember_key()


def _is_plain(key: Any) -> bool:
    """Whether `key` is a value one can look for: not unset, and no expression for the database."""
    return key is not None and not hasattr(key, "resolve_expression")


def _following_moves(run: Callable[[], T], using: str, attempts: int = 10) -> T:
    """`run()`, again when somebody moved the row to another partition while we waited for it.

    PostgreSQL cannot follow a row there and raises a serialization failure even under READ
    COMMITTED (docs, "Partitioning Limitations"). Outside a transaction the statement can simply be
    run again; inside one, the error has already ended it and must be seen.
    """
    while True:
        try:
            return run()
        except OperationalError as error:
            attempts -= 1
            moved = getattr(error.__cause__, "sqlstate", None) == SERIALIZATION_FAILURE
            if not moved or not attempts or connections[using].in_atomic_block:
                raise
