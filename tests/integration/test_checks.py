"""Each mistake has its check, each check its id and a hint."""

from __future__ import annotations

import sys

import pytest
from django.core.management import call_command
from django.core.management.base import SystemCheckError
from django.db import connection, models
from django.test.utils import isolate_apps, override_settings

from django_scaledb.checks import check_settings
from django_scaledb.models import PartitionedModel, UUID7Field
from django_scaledb.partitions import checks
from tests.archives import use_storage
from tests.testapp.models import Event, Odd


class InTestapp:
    app_label = "testapp"


def messages(*classes: type[models.Model]):
    """What the checks say about these classes, as {id: message}."""
    found = []
    for model in classes:
        if issubclass(model, PartitionedModel):
            found += checks._check_declaration(model)
        found += checks.check_model_relations(model)
    assert all(message.hint for message in found)
    return {message.id.partition(".")[2]: message for message in found}


def test_the_test_project_is_clean():
    call_command("check", fail_level="DEBUG")


@isolate_apps("tests.testapp")
def test_a_good_model_has_nothing_to_say():
    class Good(PartitionedModel):
        at = models.DateTimeField()
        name = models.TextField()

        class Meta:
            app_label = "testapp"
            constraints = [models.UniqueConstraint(fields=["name", "at"], name="good")]

        class PartitioningMeta:
            key = "at"  # a string is a list of one

    assert messages(Good) == {}


@isolate_apps("tests.testapp")
@pytest.mark.parametrize(
    ("key", "field", "id", "text"),
    [
        ([], models.DateTimeField(), "E003", "has no PartitioningMeta.key"),
        (["a", "b"], models.DateTimeField(), "E003", "exactly one field"),
        (["nope"], models.DateTimeField(), "E003", "no field 'nope'"),
        (["at"], models.IntegerField(), "E003", "must be a DateTimeField, a DateField or a UUID7Field"),
        (["at"], models.DateTimeField(null=True), "E004", "allows NULL"),
        (["at"], UUID7Field(), "E005", "not the primary key"),
    ],
)
def test_the_key(key, field, id, text):
    wanted = key

    class Wrong(PartitionedModel):
        Meta = InTestapp

        at = field

        class PartitioningMeta:
            key = wanted

    found = messages(Wrong)
    assert text in found[id].msg
    assert "testapp.Wrong" in found[id].msg


@isolate_apps("tests.testapp")
@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("interval", "1 fortnight"),
        ("interval", "0 days"),
        ("premake", -1),
        ("premake", "two"),
        ("retention", "soon"),
        ("retention_action", "shred"),
        ("detached_for", 7),
        ("time_zone", "Mars/Olympus"),
        ("default_partition", "yes"),
        ("intervall", "1 year"),
    ],
)
def test_the_other_attributes(attribute, value):
    class Wrong(PartitionedModel):
        Meta = InTestapp

        at = models.DateTimeField()

        PartitioningMeta = type("PartitioningMeta", (), {"key": ["at"], attribute: value})

    assert attribute in messages(Wrong)["E006"].msg


@isolate_apps("tests.testapp")
def test_uniqueness_without_the_key():
    class Unique(PartitionedModel):
        at = models.DateTimeField()
        code = models.TextField(unique=True)
        name = models.TextField()

        class Meta:
            app_label = "testapp"
            constraints = [models.UniqueConstraint(fields=["name"], name="by_name")]

        class PartitioningMeta:
            key = ["at"]

    found = messages(Unique)
    assert "code is unique without the partition key" in found["E007"].msg
    assert "by_name (name)" in found["E008"].msg


@isolate_apps("tests.testapp")
def test_foreign_keys_to_a_timestamp_keyed_model_need_db_constraint_false():
    class Target(PartitionedModel):
        Meta = InTestapp

        at = models.DateTimeField()
        tags = models.ManyToManyField("testapp.Label")

        class PartitioningMeta:
            key = ["at"]

    class Label(models.Model):
        Meta = InTestapp

    class Pointer(models.Model):
        Meta = InTestapp

        good = models.ForeignKey(Target, models.CASCADE, db_constraint=False, related_name="+")
        bad = models.ForeignKey(Target, models.CASCADE, related_name="+")

    message = messages(Pointer)["E009"]
    assert "testapp.Pointer.bad" in message.msg
    assert "db_constraint" in message.hint
    through = messages(Target.tags.through)["E009"]
    assert "many-to-many" in through.msg
    assert "db_constraint=False on the ManyToManyField" in through.hint


@isolate_apps("tests.testapp")
def test_inheritance_of_tables_and_composite_keys():
    class Parent(PartitionedModel):
        Meta = InTestapp

        at = models.DateTimeField()

        class PartitioningMeta:
            key = ["at"]

    class Child(Parent):
        Meta = InTestapp

    class Composite(PartitionedModel):
        Meta = InTestapp

        pk = models.CompositePrimaryKey("id", "at")
        id = models.BigIntegerField()
        at = models.DateTimeField()

        class PartitioningMeta:
            key = ["at"]

    assert "E002" in messages(Child)
    assert "E001" in messages(Composite)


def test_another_engine_is_an_error(monkeypatch):
    from django.db.backends.postgresql.base import DatabaseWrapper

    plain = DatabaseWrapper({**connection.settings_dict, "ENGINE": "django.db.backends.postgresql"}, "plain")
    monkeypatch.setattr(checks, "connections", {"plain": plain})
    [message] = checks.check_backend(None)
    assert message.id == "django_scaledb.E010"
    assert "django_scaledb.backend" in message.hint


@override_settings(SCALEDB={"LOCK_TIMOUT": 5})
def test_the_setting():
    [message] = check_settings(None)
    assert message.id == "django_scaledb.E011"
    assert "LOCK_TIMEOUT" in message.hint
    with pytest.raises(SystemCheckError):
        call_command("check")


@override_settings(SCALEDB={"UNPRUNED_QUERIES": "loud"})
def test_a_wrong_value_is_reported_and_never_used():
    [message] = check_settings(None)
    assert message.id == "django_scaledb.E011"
    assert message.hint == 'It must be "ignore", "log" or "raise".'
    assert not connection.execute_wrappers


def database_messages():
    return {
        message.id.partition(".")[2]: message
        for message in checks.check_database(None, databases=["default"])
    }


@pytest.mark.django_db
class TestDatabase:
    """`check --database default`."""

    def execute(self, *statements):
        with connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)

    def test_nothing_to_say_right_after_migrate(self):
        assert database_messages() == {}

    def test_a_plain_table(self):
        self.execute('DROP TABLE "Odd Table"', 'CREATE TABLE "Odd Table" (id bigint, "Made At" timestamptz)')
        message = database_messages()["W003"]
        assert "not a partitioned table" in message.msg
        assert message.obj is Odd

    def test_another_key(self):
        self.execute(
            'DROP TABLE "Odd Table"',
            'CREATE TABLE "Odd Table" (id bigint, "Made At" timestamptz) PARTITION BY RANGE (id)',
        )
        assert "partitioned by range (id)" in database_messages()["W003"].msg

    def test_a_short_runway_and_a_gap(self):
        self.execute(
            "CREATE TABLE old PARTITION OF testapp_event FOR VALUES FROM ('2020-01-01 00:00+00') "
            "TO ('2020-02-01 00:00+00')"
        )
        assert "no partition for 2020-02-01" in database_messages()["W005"].msg
        self.execute(
            "DO $$ DECLARE p regclass; BEGIN FOR p IN SELECT inhrelid FROM pg_inherits WHERE inhparent = "
            "'testapp_reading'::regclass LOOP EXECUTE 'DROP TABLE ' || p; END LOOP; END $$"
        )
        message = database_messages()["W004"]
        assert "testapp.Reading has fewer than 2 future partitions" in message.msg
        assert "rotate_partitions testapp.Reading" in message.hint

    def test_a_table_that_is_not_there_is_migrates_business(self):
        self.execute("DROP TABLE testapp_event CASCADE")
        assert database_messages() == {}
        assert Event._meta.db_table == "testapp_event"


@pytest.fixture
def archiving(monkeypatch):
    """Event, which is to be archived."""
    for name, value in {"retention": "1 year", "retention_action": "archive"}.items():
        monkeypatch.setitem(Event._partitioning_meta.attrs, name, value)


def archive_messages():
    found = checks.check_archives(None)
    assert all(message.hint for message in found)
    return {message.id.partition(".")[2]: message.msg for message in found}


def test_an_archive_needs_a_storage_of_its_own(archiving, settings, tmp_path):
    assert "testapp.Event is archived among uploaded files" in archive_messages()["W008"]
    settings.SCALEDB = {"ARCHIVE_STORAGE": "archive"}
    assert "'archive'" in archive_messages()["E013"]
    use_storage(settings, tmp_path)
    assert archive_messages() == {}


def test_an_archive_needs_pyarrow(archiving, settings, tmp_path, monkeypatch):
    use_storage(settings, tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow.csv", None)
    assert "pip install 'django-scaledb[archive]'" in archive_messages()["E013"]


def test_a_type_that_an_archive_would_lose(archiving, settings, tmp_path, monkeypatch):
    use_storage(settings, tmp_path)
    monkeypatch.setattr(models.BigIntegerField, "db_type", lambda self, connection: "regclass")
    assert "field 'size': regclass is kept by number" in archive_messages()["E012"]


def test_nobody_is_asked_about_archives_who_has_none():
    assert archive_messages() == {}
