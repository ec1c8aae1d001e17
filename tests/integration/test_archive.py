"""Archive, drop, restore: what comes back is what was there, and nothing is dropped that is not safe."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.apps.registry import Apps
from django.core.files.base import ContentFile
from django.core.files.storage import Storage
from django.core.management import call_command
from django.db import models
from psycopg import sql

from django_scaledb.models import Archive, PartitionedModel, UUID7Field
from django_scaledb.partitions import hooks, maintenance, registry
from django_scaledb.partitions.archive.restore import Wish, restore
from django_scaledb.partitions.archive.session import ARCHIVE_LOCK
from django_scaledb.partitions.overview import survey
from django_scaledb.postgres.statements import Statement
from tests import archives
from tests.archives import Everything, File, Rows, bring_back, done, reasons, rotate, utc
from tests.lab import Lab

NOW = utc(2026, 5, 17, 13, 7, 11)
LATER = NOW + timedelta(days=2)
STILL_LATER = LATER + timedelta(days=2)  # behind the grace period of what is archived at LATER
MARCH = "lab_everything_y2025m03"
Y2020 = "lab_file_y2020"


@pytest.fixture(params=["file system", "memory"])
def storage(request: pytest.FixtureRequest, settings: Any, tmp_path: Path) -> None:
    archives.use_storage(settings, tmp_path / "archive" if request.param == "file system" else None)


@pytest.fixture
def folder(settings: Any, tmp_path: Path) -> Path:
    archives.use_storage(settings, tmp_path / "archive")
    return tmp_path / "archive"


@pytest.fixture
def files(lab: Lab, folder: Path) -> Rows:
    """A few hundred real rows of 2020, about to be archived."""
    archives.load_files(lab, 2020, NOW, limit=300)
    return Rows(lab, "lab_file")


@pytest.fixture
def archived(lab: Lab, files: Rows) -> Rows:
    """The same, archived and dropped."""
    assert done(rotate(File, now=NOW)) == [f"detach {Y2020}", f"archive {Y2020}"]
    assert done(rotate(File, now=LATER)) == [f"drop {Y2020}"]
    return files


def is_untouched(lab: Lab) -> bool:
    """Whether the set is without the partition, and nothing lies about."""
    return Y2020 not in lab.tables() and lab.value("SELECT count(*) FROM lab_file") == 0


# -- there and back


def test_every_column_type_survives_the_round_trip(lab: Lab, storage: None) -> None:
    count = archives.make_everything(lab, NOW)
    before = Rows(lab, "lab_everything")
    assert before.count == count
    assert done(rotate(Everything, now=NOW)) == [f"detach {MARCH}", f"archive {MARCH}"]
    assert rotate(Everything, now=NOW).is_empty
    assert done(rotate(Everything, now=LATER)) == [f"drop {MARCH}"]
    assert MARCH not in lab.tables()
    assert lab.value("SELECT count(*) FROM lab_everything") == 0

    assert done(bring_back(Everything, MARCH, now=NOW)) == [f"restore {MARCH}"]
    assert before.differences() == []
    assert MARCH in lab.bounds("lab_everything")
    assert rotate(Everything, now=NOW).is_empty


def test_a_year_of_real_data(lab: Lab, folder: Path) -> None:
    archives.load_files(lab, 2020, NOW)
    table = Y2020
    before = Rows(lab, "lab_file")
    assert before.count > 5000
    indexes = set(lab.execute(f"SELECT indexdef FROM pg_indexes WHERE tablename = '{table}'"))
    assert "archive " + table in done(rotate(File, now=NOW))
    assert done(rotate(File, now=LATER)) == [f"drop {table}"]
    # As in another database, whose sequence never got so far.
    lab.execute("SELECT setval('lab_file_id_seq', 5)")
    assert done(bring_back(File, table, now=NOW)) == [f"restore {table}"]

    assert before.differences() == []
    assert set(lab.execute(f"SELECT indexdef FROM pg_indexes WHERE tablename = '{table}'")) == indexes
    assert lab.value("SELECT nextval('lab_file_id_seq')") > lab.value("SELECT max(id) FROM expected")
    assert lab.value(f"SELECT reltuples FROM pg_class WHERE relname = '{table}'") == before.count
    assert lab.value(f"SELECT count(*) FROM pg_stats WHERE tablename = '{table}'") == 9
    assert lab.value("SELECT count(*) FROM pg_stats WHERE tablename = 'lab_file'") == 9
    valid = f"SELECT bool_and(convalidated) FROM pg_constraint WHERE conrelid = '{table}'::regclass"
    assert lab.value(f"{valid} AND contype = 'f' AND conparentid <> 0") is True
    invalid = lab.value("SELECT count(*) FROM pg_index WHERE NOT indisvalid OR NOT indisready")
    assert invalid == 0
    assert lab.value("SELECT count(*) FROM pg_constraint WHERE conname = 'django_scaledb_bounds'") == 0


def test_the_file_is_for_other_readers(lab: Lab, files: Rows, folder: Path) -> None:
    import pyarrow.parquet as pq

    rotate(File, now=NOW)
    [path] = folder.rglob("*.parquet")
    table = pq.read_table(path)
    sizes = lab.execute("SELECT id, size, uploaded_at, yanked FROM expected ORDER BY id")
    read = table.select(["id", "size", "uploaded_at", "yanked"]).sort_by("id").to_pylist()
    assert [tuple(row.values()) for row in read] == sizes
    assert table.schema.field("version").metadata == {b"postgresql.type": b"character varying(100)"}
    manifest = json.loads(next(folder.rglob("*.json")).read_text())
    assert (manifest["rows"], manifest["partition"]) == (300, ["public", Y2020])
    assert (folder / manifest["file"]) == path


def test_an_empty_partition(lab: Lab, folder: Path) -> None:
    archives.load_files(lab, 2020, NOW, limit=0)
    rotate(File, now=NOW)
    assert done(rotate(File, now=LATER)) == [f"drop {Y2020}"]
    assert done(bring_back(File, Y2020, now=NOW)) == [f"restore {Y2020}"]
    assert Y2020 in lab.bounds("lab_file")


def test_other_features_take_part_in_the_transaction_that_attaches(lab: Lab, archived: Rows) -> None:
    lab.execute("CREATE TABLE seen (rows bigint, attached boolean)")

    def note(connection: Any, model: Any, table: Any) -> Iterator[Statement]:
        yield Statement(sql.SQL("INSERT INTO seen SELECT count(*), false FROM {}").format(table.sql), ())

    hook = hooks.Hook(on_restore=note)
    hooks.register(hook)
    try:
        assert done(bring_back(File, Y2020, now=NOW))
        assert bring_back(File, Y2020, now=NOW).is_empty
    finally:
        hooks.unregister(hook)
    assert lab.execute("SELECT rows FROM seen") == [(300,)]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (models.DateField(), "2012-05-17"),
        (UUID7Field(primary_key=True), "01375b3e-8c00-7000-8000-000000000001"),
        (models.DateTimeField(), "2012-12-31 23:30:00+00"),
    ],
)
def test_every_kind_of_key(lab: Lab, folder: Path, key: Any, value: str) -> None:
    """In a zone of its own, and beside a default partition."""

    class Meta:
        apps = Apps()
        app_label = "lab"
        db_table = "Odd Table"

    class PartitioningMeta:
        key = ["key"]
        interval = "1 year"
        retention = "5 years"
        retention_action = "archive"
        time_zone = "Europe/Berlin"
        default_partition = True

    body = {"Meta": Meta, "PartitioningMeta": PartitioningMeta, "__module__": __name__, "key": key}
    model = type("Keyed", (PartitionedModel,), body)
    lab.create(model, Archive, now=NOW)
    day = utc(2012, 5, 17) if "2012-05" in value or "-7000-" in value else utc(2013, 1, 1)
    maintenance.create_span([model], day, day, using="lab", now=NOW)
    lab.execute(f"""INSERT INTO "Odd Table" (key) VALUES ('{value}')""")
    before = Rows(lab, '"Odd Table"')
    [name] = lab.execute("""SELECT t.tableoid::regclass::text FROM "Odd Table" t""")[0]
    name = name.strip('"')
    assert f"archive {name}" in done(rotate(model, now=NOW))
    assert done(rotate(model, now=NOW + timedelta(days=8))) == [f"drop {name}"]
    assert done(bring_back(model, name, now=NOW)) == [f"restore {name}"]
    assert before.differences() == []
    assert name in lab.bounds("Odd Table")
    assert rotate(model, now=NOW).is_empty


# -- a detached table


def test_a_detached_table_comes_back_as_it_is(lab: Lab, files: Rows, folder: Path) -> None:
    rotate(File, now=NOW)
    assert Y2020 not in lab.bounds("lab_file")
    assert done(bring_back(File, Y2020, now=NOW)) == [f"restore {Y2020}"]
    assert files.differences() == []
    assert rotate(File, now=LATER).is_empty  # held, whatever its age
    assert bring_back(File, Y2020, now=NOW).is_empty
    # Released it is archived anew: its rows may be others by now.
    wish = Wish(f"public.{Y2020}")
    assert done(restore(File, wish, using="lab", now=NOW, release=True)) == [f"release {Y2020}"]
    assert restore(File, wish, using="lab", now=NOW, release=True).is_empty
    assert done(rotate(File, now=NOW)) == [f"detach {Y2020}", f"archive {Y2020}"]
    assert len(list(folder.rglob("*.parquet"))) == 2


def test_a_detached_table_gets_the_columns_of_its_set(lab: Lab, files: Rows) -> None:
    rotate(File, now=NOW)
    lab.execute(
        "ALTER TABLE lab_file ADD COLUMN note text NOT NULL DEFAULT 'none'",
        "ALTER TABLE lab_file ADD COLUMN maybe integer",
        "ALTER TABLE lab_file DROP COLUMN yanked",
    )
    refusal = reasons(bring_back(File, Y2020, now=NOW))
    assert "yanked" in refusal
    assert "--leave-out yanked" in refusal
    assert lab.value(f"SELECT count(yanked) FROM {Y2020}") == 300
    assert done(bring_back(File, Y2020, now=NOW, left_out=["yanked"]))
    assert lab.execute("SELECT DISTINCT note, maybe FROM lab_file") == [("none", None)]


def test_one_that_somebody_else_took_off_is_left_to_him(lab: Lab, files: Rows) -> None:
    lab.execute(f"ALTER TABLE lab_file DETACH PARTITION {Y2020}")
    assert "by hand" in reasons(bring_back(File, Y2020, now=NOW))


def test_what_there_is_not(lab: Lab, files: Rows) -> None:
    assert "did you mean lab_file_y2020?" in reasons(bring_back(File, "lab_file_y2O20", now=NOW))
    assert bring_back(File, "lab_file_y2026", now=NOW).is_empty  # attached, and not about to leave


# -- nothing is dropped that is not safe


def test_a_table_that_was_written_to_is_archived_again(lab: Lab, files: Rows, folder: Path) -> None:
    rotate(File, now=NOW)
    lab.execute(f"UPDATE {Y2020} SET size = size + 1 WHERE id = (SELECT min(id) FROM {Y2020})")
    changed = Rows(lab, Y2020)
    assert "written to since" in reasons(rotate(File, now=LATER))
    assert Y2020 in lab.tables()
    assert done(rotate(File, now=LATER)) == [f"archive {Y2020}"]
    assert rotate(File, now=LATER).is_empty
    assert done(rotate(File, now=STILL_LATER)) == [f"drop {Y2020}"]
    assert done(bring_back(File, Y2020, now=NOW))
    changed.table = Y2020
    assert changed.differences() == []


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_a_table_whose_archive_is_gone_is_not_dropped(
    lab: Lab, files: Rows, folder: Path, suffix: str
) -> None:
    rotate(File, now=NOW)
    next(folder.rglob(f"*.{suffix}")).unlink()
    assert "not in the archive's storage any more" in reasons(rotate(File, now=LATER))
    assert Y2020 in lab.tables()


class Bucket(Storage):
    """A storage without paths, as object stores are; with a fault, for as long as it has one."""

    fault = ""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def _save(self, name: str, content: Any) -> str:
        if self.fault == "raises":
            raise RuntimeError("the bucket is full")
        data = content.read()
        if self.fault == "alters" and name.endswith(".parquet"):
            import pyarrow.parquet as pq

            whole, out = pq.read_table(io.BytesIO(data)), io.BytesIO()
            pq.write_table(whole.slice(0, whole.num_rows - 1), out)
            data = out.getvalue()
        self.objects[name] = data
        return name

    def _open(self, name: str, mode: str = "rb") -> Any:
        return ContentFile(self.objects[name])

    def exists(self, name: str) -> bool:
        return name in self.objects

    def size(self, name: str) -> int:
        return len(self.objects[name])

    def delete(self, name: str) -> None:
        self.objects.pop(name, None)


@pytest.mark.parametrize(
    ("fault", "says"), [("raises", "the bucket is full"), ("alters", "is not what is read back")]
)
def test_a_storage_that_fails(
    lab: Lab, files: Rows, settings: Any, fault: str, says: str, monkeypatch: Any
) -> None:
    settings.STORAGES = {**settings.STORAGES, "archive": {"BACKEND": f"{__name__}.Bucket"}}
    monkeypatch.setattr(Bucket, "fault", fault)
    report = rotate(File, now=NOW)
    assert says in reasons(report)
    assert rotate(File, now=LATER).ok is False  # neither archived nor dropped
    assert files.count == lab.value(f"SELECT count(*) FROM {Y2020}")
    assert lab.value("SELECT count(*) FROM django_scaledb_archive") == 0
    monkeypatch.setattr(Bucket, "fault", "")
    assert done(rotate(File, now=LATER)) == [f"archive {Y2020}"]
    assert rotate(File, now=LATER).is_empty
    assert done(rotate(File, now=STILL_LATER)) == [f"drop {Y2020}"]
    assert done(bring_back(File, Y2020, now=NOW))
    assert files.differences() == []


def test_what_cannot_be_archived_stays_on_the_set(lab: Lab, files: Rows) -> None:
    lab.execute("ALTER TABLE lab_file ADD COLUMN target regclass")
    lab.execute("DROP TABLE lab_file_y2026")
    report = rotate(File, now=NOW)
    assert "regclass is kept by number" in reasons(report)
    assert {Y2020, "lab_file_y2026"} <= set(lab.bounds("lab_file"))  # what it lacks it gets


def test_one_archives_a_set_at_a_time(lab: Lab, files: Rows) -> None:
    lock = f"SELECT pg_advisory_lock({ARCHIVE_LOCK}, 'lab_file'::regclass::oid::int)"
    lab.session().execute(lock)
    assert "another run is archiving" in reasons(rotate(File, now=NOW))
    lab.close()
    assert done(rotate(File, now=NOW)) == [f"archive {Y2020}"]


# -- when things have changed since


def test_a_column_that_is_new_gets_what_add_field_gave(
    lab: Lab, archived: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.execute(
        "ALTER TABLE lab_file ADD COLUMN note text NOT NULL DEFAULT 'none'",
        "ALTER TABLE lab_file ADD COLUMN stars integer NOT NULL",
        "ALTER TABLE lab_file ADD COLUMN maybe integer",
    )
    refusal = reasons(bring_back(File, Y2020, now=NOW))
    assert "'stars'" in refusal
    assert "db_default" in refusal
    assert is_untouched(lab)
    stars = models.IntegerField(default=5)
    stars.set_attributes_from_name("stars")
    stars.model = File
    monkeypatch.setattr(File._meta, "local_fields", [*File._meta.local_fields, stars])
    assert done(bring_back(File, Y2020, now=NOW))
    assert lab.execute("SELECT DISTINCT note, stars, maybe FROM lab_file") == [("none", 5, None)]
    has_default = "SELECT atthasdef FROM pg_attribute WHERE attname = 'stars' AND attrelid = "
    assert lab.value(f"{has_default}'{Y2020}'::regclass") is False
    lab.execute("ALTER TABLE lab_file DROP COLUMN note, DROP COLUMN stars, DROP COLUMN maybe")
    assert archived.differences() == []


def test_a_column_that_is_gone_has_to_be_given_up(lab: Lab, archived: Rows) -> None:
    lab.execute("ALTER TABLE lab_file DROP COLUMN python_version")
    refusal = reasons(bring_back(File, Y2020, now=NOW))
    assert "--leave-out python_version" in refusal
    assert is_untouched(lab)
    assert "no column that the table has lost" in reasons(bring_back(File, Y2020, now=NOW, left_out=["size"]))
    assert done(bring_back(File, Y2020, now=NOW, left_out=["python_version"]))
    lab.execute("ALTER TABLE expected DROP COLUMN python_version")
    assert archived.differences() == []


def test_a_column_of_another_type(lab: Lab, archived: Rows) -> None:
    lab.execute("ALTER TABLE lab_file ALTER COLUMN size TYPE date USING 'today'")
    assert "cannot turn one into the other" in reasons(bring_back(File, Y2020, now=NOW))
    lab.execute("ALTER TABLE lab_file DROP COLUMN size", "ALTER TABLE lab_file ADD COLUMN size integer")
    lab.execute("ALTER TABLE lab_file ALTER COLUMN uploaded_at SET NOT NULL")
    lab.execute("ALTER TABLE lab_file ALTER COLUMN filename TYPE varchar(10)")
    assert not bring_back(File, Y2020, now=NOW).ok  # too long for it
    assert is_untouched(lab)
    # What fits without an error, and not without a loss.
    lab.execute("""ALTER TABLE lab_file ALTER COLUMN filename TYPE "char", ALTER COLUMN size TYPE real""")
    assert "not what was archived" in reasons(bring_back(File, Y2020, now=NOW))
    assert is_untouched(lab)
    lab.execute("ALTER TABLE lab_file ALTER COLUMN filename TYPE text, ALTER COLUMN size TYPE numeric(20,2)")
    assert done(bring_back(File, Y2020, now=NOW))
    assert lab.value("SELECT sum(size) FROM lab_file") == lab.value("SELECT sum(size) FROM expected")


def test_rows_that_point_at_what_is_gone(lab: Lab, archived: Rows) -> None:
    lab.execute("CREATE TABLE gone AS SELECT * FROM lab_project", "DELETE FROM lab_project")
    refusal = reasons(bring_back(File, Y2020, now=NOW))
    assert "add what is missing in public.lab_project" in refusal
    assert lab.value("SELECT count(*) FROM lab_file") == 0
    [shown] = survey([File], using="lab", now=NOW).models
    assert [r.partition.state.value for r in shown.rows if r.partition.table.name == Y2020] == ["restoring"]
    assert [p.problem for p in shown.problems] == ["unfinished"]
    assert rotate(File, now=NOW).is_empty
    lab.execute("INSERT INTO lab_project SELECT * FROM gone")
    assert done(bring_back(File, Y2020, now=NOW)) == [f"restore {Y2020}"]
    assert archived.differences() == []


def test_a_place_that_is_taken(lab: Lab, archived: Rows) -> None:
    maintenance.create_span([File], utc(2020, 1, 1), utc(2020, 1, 2), using="lab", now=NOW)
    assert "another partition than the archived one" in reasons(bring_back(File, Y2020, now=NOW))
    lab.execute(f"ALTER TABLE {Y2020} RENAME TO other")
    assert "takes rows of that time now" in reasons(bring_back(File, Y2020, now=NOW))
    lab.execute(
        f"ALTER TABLE other RENAME TO {Y2020}", f"DROP TABLE {Y2020}", f"CREATE TABLE {Y2020} (id int)"
    )
    assert "name of another table" in reasons(bring_back(File, Y2020, now=NOW))


def test_a_file_that_is_damaged(lab: Lab, archived: Rows, folder: Path) -> None:
    [path] = folder.rglob("*.parquet")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "SHA-256" in reasons(bring_back(File, Y2020, now=NOW))
    assert is_untouched(lab)


def test_an_archive_that_the_database_does_not_know_of(lab: Lab, archived: Rows, folder: Path) -> None:
    lab.execute("DELETE FROM django_scaledb_archive")
    assert "neither detached nor archived" in reasons(bring_back(File, Y2020, now=NOW))
    manifest = str(next(folder.rglob("*.json")).relative_to(folder))
    assert "and not of" in reasons(bring_back(File, "lab_file_y2019", now=NOW, manifest=manifest))
    assert done(bring_back(File, Y2020, now=NOW, manifest=manifest))
    assert archived.differences() == []


# -- what is said


def test_what_is_archived_is_listed(lab: Lab, archived: Rows) -> None:
    [model] = survey([File], using="lab", now=NOW).as_json()["models"]
    [row] = [p for p in model["partitions"] if p["state"] == "archived"]
    assert row["partition"] == f"public.{Y2020}"
    assert (row["rows"], row["from"]) == (300, "2020-01-01T00:00:00+00:00")
    assert row["archived_at"] == NOW.isoformat()
    assert row["manifest"].endswith(".json")
    done(bring_back(File, Y2020, now=LATER))
    [model] = survey([File], using="lab", now=NOW).as_json()["models"]
    assert [p["held_since"] for p in model["partitions"] if Y2020 in p["partition"]] == [LATER.isoformat()]
    assert not [p for p in model["partitions"] if p["state"] == "archived"]


def test_dry_runs_touch_nothing(lab: Lab, files: Rows, folder: Path) -> None:
    report = rotate(File, now=NOW, dry_run=True)
    [result] = [r for model in report.models for r in model.results if r.action == "archive"]
    [sent] = result.sent
    assert sent.sql.startswith("COPY (SELECT ")
    assert Y2020 in lab.bounds("lab_file")
    assert not folder.exists()
    rotate(File, now=NOW)
    rotate(File, now=LATER)
    report = bring_back(File, Y2020, now=NOW, dry_run=True)
    statements = [sent.sql for model in report.models for result in model.results for sent in result.sent]
    assert any("ATTACH PARTITION" in text for text in statements)
    assert any(text.startswith("COPY ") for text in statements)
    assert is_untouched(lab)


def test_the_command(lab: Lab, archived: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "partitioned_models", lambda: [File])
    monkeypatch.setattr("django.apps.apps.get_model", lambda *args: File)
    out = io.StringIO()
    call_command("restore_partition", "lab.File", Y2020, using="lab", now=str(NOW), format="json", stdout=out)
    content = json.loads(out.getvalue())
    assert (content["ok"], content["command"]) == (True, "restore_partition")
    [action] = content["models"][0]["actions"]
    assert (action["action"], action["partition"], action["status"]) == ("restore", f"public.{Y2020}", "done")
    with pytest.raises(SystemExit) as end:
        call_command("restore_partition", "lab.File", "nonsense", using="lab", stderr=out)
    assert end.value.code == 1
