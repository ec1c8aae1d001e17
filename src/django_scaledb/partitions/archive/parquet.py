"""PostgreSQL's CSV to Parquet and back, a few megabytes at a time.

pyarrow (the ``archive`` extra) is imported when it is needed. Each chunk of CSV becomes a row group
of its own, so that either direction holds one chunk in memory, however wide a row is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import IO, TYPE_CHECKING, Any

from django_scaledb.exceptions import ConfigurationError
from django_scaledb.partitions.archive.columns import Column, Form

if TYPE_CHECKING:
    import pyarrow

CHUNK_BYTES = 4 << 20
CHUNK_ROWS = 50_000


def require() -> None:
    """Raises `ConfigurationError` where pyarrow is not installed."""
    try:
        import pyarrow.csv
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            f"archives need pyarrow: pip install 'django-scaledb[archive]' ({error})"
        ) from error


class Writer:
    """Writes rows, as COPY sends them, to a Parquet `file`."""

    def __init__(self, file: IO[bytes], columns: Sequence[Column], notes: dict[str, str]) -> None:
        import pyarrow.parquet as pq

        self._columns = columns
        self._schema = schema(columns, notes)
        self._writer = pq.ParquetWriter(file, self._schema, compression="zstd")
        self._lines: list[bytes] = []
        self._bytes = 0
        self.rows = 0

    def add(self, line: bytes) -> bool:
        """One row: PostgreSQL sends each in a message of its own (protocol, "COPY Operations").

        True when a chunk was full, and `rows` has grown.
        """
        self._lines.append(line)
        self._bytes += len(line)
        if self._bytes < CHUNK_BYTES and len(self._lines) < CHUNK_ROWS:
            return False
        self.flush()
        return True

    def flush(self) -> None:
        if self._lines:
            text, count = b"".join(self._lines), len(self._lines)
            self._lines, self._bytes = [], 0
            self._writer.write_table(self._parsed(text), row_group_size=count)
            self.rows += count

    def close(self) -> None:
        self.flush()
        self._writer.close()

    def _parsed(self, text: bytes) -> pyarrow.Table:
        import pyarrow as pa
        from pyarrow import csv

        raw = {c.name: pa.string() if c.form is Form.BYTES else _type(c) for c in self._columns}
        table = csv.read_csv(
            pa.BufferReader(text),
            # One block: a row never has to fit into a smaller one.
            read_options=csv.ReadOptions(
                column_names=list(raw), use_threads=False, block_size=min(len(text) + 1, _MOST)
            ),
            parse_options=csv.ParseOptions(newlines_in_values=True, ignore_empty_lines=False),
            convert_options=csv.ConvertOptions(
                column_types=raw,
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
                true_values=["t"],
                false_values=["f"],
            ),
        )
        arrays = [
            _bytes_of(table.column(i)) if column.form is Form.BYTES else table.column(i)
            for i, column in enumerate(self._columns)
        ]
        return pa.Table.from_arrays(arrays, schema=self._schema)


def chunks(file: IO[bytes], columns: Sequence[Column]) -> Iterator[tuple[bytes, int]]:
    """CSV for COPY, of `columns` in their order, and the number of rows in it."""
    import pyarrow.parquet as pq
    from pyarrow import csv

    options = csv.WriteOptions(include_header=False, quoting_style="needed")
    with pq.ParquetFile(file, pre_buffer=False) as parquet:
        for number in range(parquet.num_row_groups):
            table = parquet.read_row_group(number, use_threads=False)
            arrays = [
                _text_of(table.column(column.name))
                if column.form is Form.BYTES
                else table.column(column.name)
                for column in columns
            ]
            out = BytesIO()
            csv.write_csv(_named(arrays), out, options)
            yield out.getvalue(), table.num_rows


def schema(columns: Sequence[Column], notes: dict[str, str]) -> pyarrow.Schema:
    """Field metadata name each column's type in PostgreSQL; `notes` are the file's."""
    import pyarrow as pa

    fields = [
        pa.field(column.name, _type(column), metadata={"postgresql.type": column.type}) for column in columns
    ]
    return pa.schema(fields, metadata={f"django_scaledb.{name}": note for name, note in notes.items()})


_MOST = (1 << 31) - 1


def _type(column: Column) -> Any:
    import pyarrow as pa

    if column.form is Form.DECIMAL:
        return pa.decimal128(*column.digits)
    return {
        Form.BOOL: pa.bool_(),
        Form.INT16: pa.int16(),
        Form.INT32: pa.int32(),
        Form.INT64: pa.int64(),
        Form.FLOAT32: pa.float32(),
        Form.FLOAT64: pa.float64(),
        Form.DATE: pa.date32(),
        Form.TIME: pa.time64("us"),
        Form.TIMESTAMP: pa.timestamp("us"),
        Form.TIMESTAMPTZ: pa.timestamp("us", tz="UTC"),
        Form.BYTES: pa.binary(),
        Form.TEXT: pa.string(),
    }[column.form]


def _bytes_of(column: Any) -> Any:
    r"""PostgreSQL's ``\x00ff`` as bytes."""
    import pyarrow as pa

    return pa.array(
        [None if text is None else bytes.fromhex(text[2:]) for text in column.to_pylist()], pa.binary()
    )


def _text_of(column: Any) -> Any:
    import pyarrow as pa

    return pa.array(
        [None if value is None else "\\x" + value.hex() for value in column.to_pylist()], pa.string()
    )


def _named(arrays: Sequence[Any]) -> Any:
    """A table of `arrays`; nobody looks at the names."""
    import pyarrow as pa

    return pa.Table.from_arrays(list(arrays), names=[str(i) for i in range(len(arrays))])
