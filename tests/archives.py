"""What the tests of the archive share: a table with every column type, a storage, a comparison of rows."""

from __future__ import annotations

import csv
import gzip
import io
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from django.contrib.postgres import fields as pg
from django.contrib.postgres.search import SearchVectorField
from django.db import models
from django.db.models.functions import Upper

from django_scaledb.models import Archive, PartitionedModel
from django_scaledb.partitions import maintenance
from django_scaledb.partitions.archive.restore import Wish, restore
from django_scaledb.partitions.report import Report
from tests.lab import Lab, lab_apps

DATA = Path(__file__).parents[1] / "example" / "data" / "pypi_uploads.csv.gz"


class Everything(PartitionedModel):
    """Every field that Django has for PostgreSQL, and some columns that only SQL can make."""

    at = models.DateTimeField()
    small = models.SmallIntegerField(null=True)
    number = models.IntegerField(null=True)
    big = models.BigIntegerField(null=True)
    positive = models.PositiveIntegerField(null=True)
    flag = models.BooleanField(null=True)
    real = models.FloatField(null=True)
    price = models.DecimalField(max_digits=12, decimal_places=4, null=True)
    wide = models.DecimalField(max_digits=38, decimal_places=20, null=True)
    huge = models.DecimalField(max_digits=1000, decimal_places=500, null=True)
    short = models.CharField(max_length=50, null=True)
    text = models.TextField(null=True)
    slug = models.SlugField(null=True)
    moment = models.DateTimeField(null=True)
    day = models.DateField(null=True)
    clock = models.TimeField(null=True)
    spell = models.DurationField(null=True)
    uuid = models.UUIDField(null=True)
    blob = models.BinaryField(null=True)
    address = models.GenericIPAddressField(null=True)
    document = models.JSONField(null=True)
    upload = models.FileField(null=True)
    numbers = pg.ArrayField(models.IntegerField(null=True), null=True)
    words = pg.ArrayField(pg.ArrayField(models.TextField(null=True)), null=True)
    moments = pg.ArrayField(models.DateTimeField(null=True), null=True)
    pairs = pg.HStoreField(null=True)
    integers = pg.IntegerRangeField(null=True)
    bigs = pg.BigIntegerRangeField(null=True)
    decimals = pg.DecimalRangeField(null=True)
    times = pg.DateTimeRangeField(null=True)
    days = pg.DateRangeField(null=True)
    vector = SearchVectorField(null=True)
    loud = models.GeneratedField(expression=Upper("short"), output_field=models.TextField(), db_persist=True)

    class Meta:
        apps = lab_apps
        app_label = "lab"
        indexes = [models.Index(fields=["number"], name="lab_everything_number")]

    class PartitioningMeta:
        key = ["at"]
        interval = "1 month"
        premake = 1
        retention = "6 months"
        retention_action = "archive"
        detached_for = "1 day"


class Project(models.Model):
    name = models.CharField(max_length=100, unique=True)

    class Meta:
        apps = lab_apps
        app_label = "lab"


class File(PartitionedModel):
    """What the example has: files uploaded for projects, by year."""

    project = models.ForeignKey(Project, on_delete=models.CASCADE)
    version = models.CharField(max_length=100)
    filename = models.CharField(max_length=255)
    packagetype = models.CharField(max_length=20)
    python_version = models.CharField(max_length=50)
    size = models.BigIntegerField()
    uploaded_at = models.DateTimeField()
    yanked = models.BooleanField(default=False)

    class Meta:
        apps = lab_apps
        app_label = "lab"
        indexes = [models.Index(fields=["packagetype", "size"], name="lab_file_type")]

    class PartitioningMeta:
        key = ["uploaded_at"]
        interval = "1 year"
        premake = 1
        retention = "5 years"
        retention_action = "archive"
        detached_for = "1 day"


RAW_COLUMNS = {
    "raw_numeric": "numeric",
    "raw_real": "real",
    "raw_json": "json",
    "raw_timestamp": "timestamp",
    "raw_timetz": "timetz",
    "raw_bits": "varbit",
    "raw_mac": "macaddr",
    "raw_point": "point",
    "raw_mood": "mood",
    "raw_pair": "pair",
    "raw_char": "char(5)",
    "raw_money": "money",
    "raw_multi": "int4multirange",
    "raw_query": "tsquery",
    'Odd "Name': "text[]",
}
"""Types that no field of Django's has."""

VALUES: dict[str, tuple[str, ...]] = {
    "small": ("-32768", "32767"),
    "number": ("-2147483648", "0"),
    "big": ("-9223372036854775808", "9223372036854775807"),
    "positive": ("0", "2147483647"),
    "flag": ("true", "false"),
    "real": ("'NaN'", "'Infinity'", "'-Infinity'", "5e-324", "1.7976931348623157e308", "'-0'", "0.1", "1e15"),
    "price": ("12345678.9999", "-0.0001", "0"),
    "wide": ("999999999999999999.99999999999999999999", "-0.00000000000000000001"),
    "huge": ("power(10::numeric, 499)", "1e-500", "'NaN'"),
    "short": ("''", "' '", "'Äß'", "'NULL'"),
    "text": (
        r"E'line\nand\r\n\ttab, \"quotes\" ''single'' \\\\ back'",
        "'\U0001f9e8 \u202e \u0000'".replace("\u0000", "\u0001"),
        r"'\N'",
        r"'\.'",
        "''",
        "repeat('x', 300000)",
        "'\ufeff\ufffe'",
    ),
    "slug": ("'a-b'",),
    "moment": (
        "'2024-02-29 23:59:59.999999+00'",
        "'0001-01-01 00:00:00+00'",
        "'9999-12-31 23:59:59.999999+00'",
        "'1969-12-31 23:59:59.000001+00'",
    ),
    "day": ("'2024-02-29'", "'0001-01-01'", "'9999-12-31'"),
    "clock": ("'00:00'", "'23:59:59.999999'"),
    "spell": ("'1 year 2 months -3 days 04:05:06.789012'", "'-178000000 years'", "'00:00:00.000001'"),
    "uuid": ("'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'",),
    "blob": (r"'\x'", r"'\x00ff0a2c22'", r"decode(repeat('00ff', 70000), 'hex')"),
    "address": ("'::1'", "'10.0.0.0/8'", "'192.168.1.5/24'"),
    "document": (
        """'{"a": [1, 2.50, null, "\\u00e4\\n"], "b": 1e400}'""",
        "'null'",
        "'\"text\"'",
        "'123456789012345678901234567890.1'",
    ),
    "upload": ("'a/b.txt'",),
    "numbers": ("'{}'", "'{1,NULL,3}'", "'[0:1]={7,8}'"),
    "words": ("""'{{"a","b,c"},{NULL,"NULL"}}'""", r"""'{{"q\"uote","back\\slash"},{"",""}}'"""),
    "moments": ("'{2024-01-01 00:00:00.000001+00,NULL,infinity}'",),
    "pairs": ("""'"a"=>"1","b"=>NULL,"c, d"=>"=>"'""", "''"),
    "integers": ("'empty'", "'[1,10)'", "'(,5]'"),
    "bigs": ("'[1,9223372036854775806]'",),
    "decimals": ("'(1.50,2.500]'", "'[0,NaN]'"),
    "times": ("'[2024-01-01 00:00:00.1+00,infinity)'",),
    "days": ("'[2024-01-01,)'",),
    "vector": ("""to_tsvector('english', 'The quick brown fox') || '''it''''s'':3A'""",),
    "raw_numeric": ("'Infinity'", "'NaN'", "1.1000", "power(10::numeric, 2000)", "1e-1000"),
    "raw_real": ("1e-45", "3.4028235e38", "'NaN'", "0.1"),
    "raw_json": ("""'{"b":  1, "a": 2, "a": 3}'""",),
    "raw_timestamp": ("'infinity'", "'4713-01-01 00:00:00 BC'", "'294276-12-31 23:59:59.999999'"),
    "raw_timetz": ("'12:00:00.000001+05:30'",),
    "raw_bits": ("B'10110'", "B''"),
    "raw_mac": ("'08:00:2b:01:02:03'",),
    "raw_point": ("'(0.1,-1e-300)'",),
    "raw_mood": ("'so so'",),
    "raw_pair": ("""ROW(1, 'a "b", c')""", "ROW(NULL, '')"),
    "raw_char": ("'ab'",),
    "raw_money": ("1234.56",),
    "raw_multi": ("'{[1,3),[7,9)}'", "'{}'"),
    "raw_query": ("'fat & (rat | cat)'",),
    'Odd "Name': ("ARRAY['x']",),
}
"""Values that are easily lost, by column; the other columns of their rows are NULL."""

LONG_AGO = "2025-03-05 12:00:00.123456+00"


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def make_everything(lab: Lab, now: datetime) -> int:
    """The table with all values in its partition of March 2025; how many rows that are."""
    lab.execute("CREATE EXTENSION hstore", superuser=True)
    lab.execute("CREATE TYPE mood AS ENUM ('bad', 'so so')", "CREATE TYPE pair AS (a integer, b text)")
    lab.create(Everything, Archive, now=now)
    lab.execute(
        *(f"ALTER TABLE lab_everything ADD COLUMN {quoted(c)} {type_}" for c, type_ in RAW_COLUMNS.items())
    )
    maintenance.create_span([Everything], utc(2025, 3, 1), utc(2025, 3, 2), using="lab", now=now)
    maintenance.rotate([Everything], using="lab", now=now, retire=False)
    statements = [
        f"INSERT INTO lab_everything (at, {quoted(column)}) VALUES ('{LONG_AGO}', {value})"
        for column, values in VALUES.items()
        for value in values
    ]
    missing = set(columns_of(lab)) - set(VALUES) - {"id", "at", "loud"}
    assert not missing, f"no value for {missing}"
    all_at_once = ", ".join(values[0] for values in VALUES.values())
    names = ", ".join(map(quoted, VALUES))
    lab.execute(
        *statements,
        f"INSERT INTO lab_everything (at, {names}) VALUES ('{LONG_AGO}', {all_at_once})",
        f"INSERT INTO lab_everything (at) VALUES ('{LONG_AGO}')",
    )
    return len(statements) + 2


COLUMNS = "version, filename, packagetype, python_version, size, uploaded_at, yanked"
INCOMING = """
    CREATE TEMPORARY TABLE incoming (project text, version text, filename text, packagetype text,
        python_version text, size bigint, uploaded_at timestamptz, yanked boolean)
"""
INSERT = f"""
    INSERT INTO lab_file (project_id, {COLUMNS})
    SELECT p.id, i.{COLUMNS.replace(", ", ", i.")}
    FROM incoming i JOIN lab_project p ON p.name = i.project ORDER BY uploaded_at LIMIT %s
"""


@cache
def files_of(year: int) -> bytes:
    """The real data's lines of one year, as CSV."""
    with gzip.open(DATA, "rt", newline="") as file:
        lines = csv.reader(file)
        at = next(lines).index("uploaded_at")
        out = io.StringIO()
        csv.writer(out).writerows(line for line in lines if line[at].startswith(str(year)))
    return out.getvalue().encode()


def load_files(lab: Lab, year: int, now: datetime, limit: int | None = None) -> None:
    """The real data's uploads of one year, in a partition of their own."""
    lab.create(Project, File, Archive, now=now)
    maintenance.create_span([File], utc(year, 1, 1), utc(year, 1, 2), using="lab", now=now)
    maintenance.rotate([File], using="lab", now=now, retire=False)
    with lab.session() as session:
        session.execute(INCOMING)
        with session.cursor().copy("COPY incoming FROM STDIN (FORMAT csv)") as copy:
            copy.write(files_of(year))
        session.execute("INSERT INTO lab_project (name) SELECT DISTINCT project FROM incoming")
        session.execute(INSERT, [limit])


def columns_of(lab: Lab) -> list[str]:
    rows = lab.execute(
        "SELECT attname FROM pg_attribute WHERE attrelid = 'lab_everything'::regclass AND attnum > 0"
    )
    return [name for (name,) in rows]


def utc(*parts: int) -> datetime:
    return datetime(*parts, tzinfo=UTC)  # type: ignore[arg-type]


def use_storage(settings: Any, folder: Path | None) -> None:
    """Archive into `folder`, or without one into memory."""
    backend = "InMemoryStorage" if folder is None else "FileSystemStorage"
    entry = {"BACKEND": f"django.core.files.storage.{backend}"}
    if folder is not None:
        entry["OPTIONS"] = {"location": str(folder)}  # type: ignore[assignment]
    settings.STORAGES = {**settings.STORAGES, "archive": entry}
    settings.SCALEDB = {"ARCHIVE_STORAGE": "archive"}


def rotate(*models: type, now: datetime, **options: Any) -> Report:
    options = {"lock_timeout": 500, "deadline": 10.0} | options
    return maintenance.rotate(models, using="lab", now=now, **options)


def bring_back(model: type, name: str, *, now: datetime, **options: Any) -> Report:
    wish = Wish(name, options.pop("manifest", None), tuple(options.pop("left_out", ())))
    options = {"lock_timeout": 500, "deadline": 10.0} | options
    return restore(model, wish, using="lab", now=now, **options)


def done(report: Report) -> list[str]:
    """``archive lab_everything_y2025m03``, in order; all must have been."""
    assert report.ok, [str(error) for error in (*report.failures(), report.error)]
    results = [result for model in report.models for result in model.results]
    return [f"{result.action} {result.partition.name}" for result in results if result.partition]


def reasons(report: Report) -> str:
    assert not report.ok
    return "\n".join(reason for _, reason in report.failures())


class Rows:
    """The rows of a table as they were, compared by SQL that is not the package's."""

    def __init__(self, lab: Lab, table: str) -> None:
        self.lab, self.table = lab, table
        lab.execute(f"DROP TABLE IF EXISTS expected; CREATE TABLE expected AS SELECT * FROM {table}")
        self.count = lab.value("SELECT count(*) FROM expected")

    def differences(self, where: str = "true") -> list[str]:
        """The rows that only one of the two has, as text; a row that is there twice is one of them."""
        new = f"SELECT t::text FROM {self.table} t WHERE {where}"
        old = f"SELECT t::text FROM expected t WHERE {where}"
        rows = self.lab.execute(
            f"(SELECT 'lost', * FROM ({old} EXCEPT ALL {new}) a) UNION ALL "
            f"(SELECT 'new', * FROM ({new} EXCEPT ALL {old}) a)"
        )
        return [f"{what} {text[:200]}" for what, text in rows]
