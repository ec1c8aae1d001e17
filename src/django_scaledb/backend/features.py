"""What the database can do, where partitioned tables differ from others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django_scaledb.backend import psqlextra
from django_scaledb.partitions.options import is_partitioned

if TYPE_CHECKING:
    from django.db.backends.postgresql.features import DatabaseFeatures as _Features
else:
    # Whatever the base backend has (PostGIS has its own).
    _Features = psqlextra.DatabaseWrapper.features_class


class DatabaseFeatures(_Features):
    """PostgreSQL's features."""

    def allows_group_by_selected_pks_on_model(self, model: Any) -> bool:
        # The other columns depend on the table's primary key, which is (id, key), and not on the id alone.
        if is_partitioned(model) and model._key_beside_pk() is not None:
            return False
        allows: bool = super().allows_group_by_selected_pks_on_model(model)
        return allows
