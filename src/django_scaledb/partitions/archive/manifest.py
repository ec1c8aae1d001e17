"""What lies in the archive, as the JSON beside each Parquet file (pure).

::

    {
      "django_scaledb": "archive", "version": 1,
      "model": "shop.Order", "table": ["public", "shop_order"],
      "partition": ["public", "shop_order_y2026m08"],
      "key": "placed_at",
      "from": "2026-08-01T00:00:00+00:00", "to": "2026-09-01T00:00:00+00:00",
      "columns": [{"name": "total", "type": "numeric(10,2)", "form": "decimal128",
                   "not_null": true, "generated": false}],
      "rows": 120000, "checksum": "-81985529216486896",
      "file": "default/public.shop_order/..parquet", "bytes": 2345678, "sha256": "..",
      "archived_at": "2027-01-10T03:00:00+00:00", "postgresql": "18.1"
    }

It is written last: an archive without it is the rest of a run that died.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django_scaledb.exceptions import ConfigurationError
from django_scaledb.partitions.archive.columns import Column, Form
from django_scaledb.partitions.bounds import Range
from django_scaledb.partitions.marker import iso, read_bound
from django_scaledb.postgres.identifiers import TableName

KIND = "archive"
VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """One partition in the archive; `checksum` is that of `columns.sums` over the stored columns."""

    model: str
    table: TableName
    partition: TableName
    key: str
    range: Range
    columns: tuple[Column, ...]
    rows: int
    checksum: str
    file: str
    size: int
    sha256: str
    archived_at: datetime
    postgresql: str

    def dump(self) -> bytes:
        content = {
            "django_scaledb": KIND,
            "version": VERSION,
            "model": self.model,
            "table": [self.table.schema, self.table.name],
            "partition": [self.partition.schema, self.partition.name],
            "key": self.key,
            "from": iso(self.range.lower),
            "to": iso(self.range.upper),
            "columns": [
                {
                    "name": column.name,
                    "type": column.type,
                    "form": column.form.value,
                    "not_null": column.not_null,
                    "generated": column.generated,
                }
                for column in self.columns
            ],
            "rows": self.rows,
            "checksum": self.checksum,
            "file": self.file,
            "bytes": self.size,
            "sha256": self.sha256,
            "archived_at": iso(self.archived_at),
            "postgresql": self.postgresql,
        }
        return json.dumps(content, indent=1, ensure_ascii=False).encode()

    @classmethod
    def load(cls, text: bytes, name: str) -> Manifest:
        """Raises `ConfigurationError` when the file `name` is no manifest that we understand."""
        try:
            content: dict[str, Any] = json.loads(text)
            if content["django_scaledb"] != KIND or content["version"] != VERSION:
                raise ConfigurationError(f"{name} is a manifest of another kind or version")
            return cls(
                content["model"],
                TableName(*content["table"]),
                TableName(*content["partition"]),
                content["key"],
                Range(read_bound(content["from"]), read_bound(content["to"])),
                tuple(Column(**{**column, "form": Form(column["form"])}) for column in content["columns"]),
                content["rows"],
                content["checksum"],
                content["file"],
                content["bytes"],
                content["sha256"],
                datetime.fromisoformat(content["archived_at"]),
                content["postgresql"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(f"{name} is no manifest of an archive ({error!r})") from error
