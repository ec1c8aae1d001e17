"""How a column is kept in an archive, and the SQL that reads and compares rows (pure)."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum

from psycopg import sql

from django_scaledb.postgres.identifiers import TableName


class Form(Enum):
    """What a column is in the Parquet file."""

    BOOL = "bool"
    INT16 = "int16"
    INT32 = "int32"
    INT64 = "int64"
    FLOAT32 = "float32"
    FLOAT64 = "float64"
    DATE = "date32"
    TIME = "time64[us]"
    TIMESTAMP = "timestamp[us]"
    TIMESTAMPTZ = "timestamp[us, UTC]"
    DECIMAL = "decimal128"
    BYTES = "binary"
    TEXT = "string"
    """PostgreSQL's text, which its type reads back without loss."""


_NATIVE = {
    "boolean": Form.BOOL,
    "smallint": Form.INT16,
    "integer": Form.INT32,
    "bigint": Form.INT64,
    "real": Form.FLOAT32,
    "double precision": Form.FLOAT64,
    "date": Form.DATE,
    "bytea": Form.BYTES,
}
_WITH_PRECISION = re.compile(r"(time|timestamp)(?:\(\d\))? (with|without) time zone")
_NUMERIC = re.compile(r"numeric\((\d+),(-?\d+)\)")
_MAX_DIGITS = 38
"""Of decimal128, the widest that readers agree on."""

# Where some values of a type have no place in the native form. Years as four digits: the only ones
# that readers of dates agree on.
_FITS = {
    Form.DATE: "isfinite({c}) AND {c} BETWEEN '0001-01-01' AND '9999-12-31'",
    Form.TIME: "{c} < '24:00'",
    Form.TIMESTAMP: "isfinite({c}) AND {c} >= '0001-01-01' AND {c} < '9999-12-31 24:00'",
    Form.TIMESTAMPTZ: "isfinite({c}) AND {c} >= '0001-01-01 00:00+00' AND {c} < '9999-12-31 24:00+00'",
    Form.DECIMAL: "{c} <> 'NaN'",
}

_BY_NAME = re.compile(r"reg[a-z]+(\[\])*")


@dataclass(frozen=True)
class Column:
    """A column of a table: `type` is PostgreSQL's, with its modifiers (``numeric(10,2)``)."""

    name: str
    type: str
    form: Form
    not_null: bool = False
    generated: bool = False

    @property
    def digits(self) -> tuple[int, int]:
        """Precision and scale of a DECIMAL."""
        match = _NUMERIC.fullmatch(self.type)
        assert match is not None
        return int(match[1]), int(match[2])


def native_form(type_: str) -> Form:
    """The form in which other readers understand `type_`, if there is one."""
    if match := _WITH_PRECISION.fullmatch(type_):
        if match[1] == "timestamp":
            return Form.TIMESTAMPTZ if match[2] == "with" else Form.TIMESTAMP
        return Form.TIME if match[2] == "without" else Form.TEXT
    if match := _NUMERIC.fullmatch(type_):
        precision, scale = int(match[1]), int(match[2])
        return Form.DECIMAL if precision <= _MAX_DIGITS and 0 <= scale <= precision else Form.TEXT
    return _NATIVE.get(type_, Form.TEXT)


def refusal(type_: str, kind: str) -> str | None:
    """Why a column of `type_` (of pg_type.typtype `kind`) cannot be archived; None when it can."""
    if _BY_NAME.fullmatch(type_):
        return f"{type_} is kept by number and written by name, so that it would not come back the same"
    if kind == "p" or type_ in ("pg_node_tree", "pg_ndistinct", "pg_dependencies", "pg_mcv_list"):
        return f"PostgreSQL does not read {type_} back"
    return None


# -- SQL


def names(columns: Sequence[Column]) -> sql.Composed:
    return sql.SQL(", ").join(sql.Identifier(column.name) for column in columns)


def stored(columns: Sequence[Column]) -> tuple[Column, ...]:
    """Without generated ones, which PostgreSQL computes anew."""
    return tuple(column for column in columns if not column.generated)


def sums(
    columns: Sequence[Column], source: sql.Composable, *, as_types: Collection[str] = ()
) -> sql.Composed:
    """``SELECT`` count and checksum of the rows of `source`, whatever their order.

    The checksum is the sum of the first 64 bits of the SHA-256 of each row's text. A column whose
    name is in `as_types` is compared as the type that it has in `columns`.
    """
    row = sql.SQL(", ").join(
        sql.SQL("{}::{}").format(sql.Identifier(c.name), sql.SQL(c.type))
        if c.name in as_types
        else sql.Identifier(c.name)
        for c in columns
    )
    return sql.SQL(
        "SELECT count(*), coalesce(sum(('x' || left(encode(sha256(convert_to(ROW({})::text, 'UTF8')), "
        "'hex'), 16))::bit(64)::bigint), 0)::text FROM {}"
    ).format(row, source)


def fits(columns: Sequence[Column], table: TableName) -> sql.Composed | None:
    """``SELECT`` for each column with a native form, in order, whether all its values have a place there."""
    tests = [
        sql.SQL("coalesce(bool_and({}), true)").format(sql.SQL(test).format(c=sql.Identifier(column.name)))
        for column in columns
        if (test := _FITS.get(column.form))
    ]
    if not tests:
        return None
    return sql.SQL("SELECT {} FROM ONLY {}").format(sql.SQL(", ").join(tests), table.sql)


def limited(columns: Sequence[Column], fitting: Sequence[bool]) -> tuple[Column, ...]:
    """`columns`, as text where `fitting` (what `fits` asked for) says no."""
    answers = iter(fitting)
    return tuple(
        Column(c.name, c.type, Form.TEXT, c.not_null, c.generated)
        if c.form in _FITS and not next(answers)
        else c
        for c in columns
    )


def copy_out(columns: Sequence[Column], table: TableName) -> sql.Composed:
    return sql.SQL("COPY (SELECT {} FROM ONLY {}) TO STDOUT (FORMAT csv)").format(names(columns), table.sql)


def copy_in(columns: Sequence[Column], table: sql.Composable) -> sql.Composed:
    return sql.SQL("COPY {} ({}) FROM STDIN (FORMAT csv)").format(table, names(columns))
