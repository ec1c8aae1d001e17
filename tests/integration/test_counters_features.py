"""What stands around the counting: receivers, reads, pages, migrations, checks."""

import logging
import threading

import pytest
from django.contrib.admin.sites import AdminSite
from django.core.checks import run_checks
from django.core.management import call_command
from django.db import IntegrityError, connection, models, transaction
from django.db.migrations.state import ProjectState
from django.db.models import Count, F
from django.test import TestCase
from django.test.utils import CaptureQueriesContext

from django_scaledb.counters import triggers
from django_scaledb.counters.operations import AlterCounterTriggers
from django_scaledb.counters.paginator import CounterAdmin, CounterPaginator, cover
from django_scaledb.counters.registry import definition
from django_scaledb.counters.signals import counters_changed
from django_scaledb.testing.counters import assert_same_totals
from tests.counterapp.models import (
    DeliveriesPerProject,
    Delivery,
    DownloadsEver,
    Owner,
    Parcel,
    ParcelsPerProject,
    Project,
    Tag,
    Upload,
    UploadsInAll,
    UploadsPerMonth,
    UploadsPerOwner,
    UploadsPerProject,
)

committing = pytest.mark.django_db(transaction=True)


@pytest.fixture
def project():
    return Project.objects.create(name="a", owner=Owner.objects.create(name="ann"))


@pytest.fixture
def heard():
    calls = []

    def receive(sender, using, changes, **kwargs):
        calls.append((sender, using, changes, connection.in_atomic_block))

    counters_changed.connect(receive, sender=UploadsPerProject)
    yield calls
    counters_changed.disconnect(receive, sender=UploadsPerProject)


@committing
def test_receivers_are_told_after_the_commit(project, heard):
    with transaction.atomic():
        Upload.objects.bulk_create(
            [Upload(project=project, size=5), Upload(project=project, size=6), Upload(size=1)]
        )
        Upload.objects.filter(size=6).delete()
        assert heard == []
    changes = [
        ({"project_id": str(project.pk)}, {"total": 1, "bytes": 5}),
        ({"project_id": None}, {"total": 1, "bytes": 1}),
    ]
    assert heard == [(UploadsPerProject, "default", changes, False)]


@committing
def test_receivers_are_not_told_of_what_was_rolled_back(project, heard):
    with transaction.atomic():
        Upload.objects.create(project=project)
        transaction.set_rollback(True)
    assert heard == []


@committing
def test_a_receiver_that_raises_undoes_nothing(project, caplog):
    def fail(**kwargs):
        raise RuntimeError("receiver")

    counters_changed.connect(fail, sender=UploadsPerProject)
    try:
        with caplog.at_level(logging.CRITICAL):
            Upload.objects.create(project=project)
    finally:
        counters_changed.disconnect(fail, sender=UploadsPerProject)
    assert UploadsPerProject.objects.get(project=project).total == 1


@committing
def test_a_receiver_of_post_save_that_raises_loses_no_count(project):
    def fail(**kwargs):
        raise RuntimeError("receiver")

    models.signals.post_save.connect(fail, sender=Upload)
    try:
        with pytest.raises(RuntimeError):
            Upload.objects.create(project=project)
    finally:
        models.signals.post_save.disconnect(fail, sender=Upload)
    assert_same_totals(UploadsPerProject, UploadsInAll)


@committing
def test_for_key_sees_its_own_transaction_and_others_do_not(project):
    seen = []

    def look():
        seen.append(UploadsPerProject.objects.for_key(project=project).total)
        connection.close()

    with transaction.atomic():
        Upload.objects.create(project=project, size=5)
        Upload.objects.create(project=project, size=6)
        row = UploadsPerProject.objects.for_key(project=project.pk)
        assert (row.total, row.bytes) == (2, 11)
        assert UploadsPerOwner.objects.for_key(owner=project.owner, country="").total == 2
        assert UploadsInAll.objects.for_key().total == 2
        assert UploadsPerMonth.objects.for_key(month=None).total == 2
        assert UploadsPerProject.objects.filter(project=project).first() is None
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        connection.apply_counters()
        assert UploadsPerProject.objects.get(project=project).total == 2
    assert seen == [0]
    assert UploadsPerProject.objects.for_key(project=None).total == 0
    assert UploadsPerProject.objects.for_key(project=None).pk is None


@committing
def test_who_follows_statements_is_shown_the_fold(project):
    """A log, and a wrapper: the fold goes past the cursors only where nobody looks."""
    seen = []

    def note(execute, sql, params, many, context):
        seen.append(sql)
        return execute(sql, params, many, context)

    with CaptureQueriesContext(connection) as logged, transaction.atomic():
        Parcel.objects.create(project=project, size=1)
    with connection.execute_wrapper(note), transaction.atomic():
        Parcel.objects.create(project=project, size=1)
    assert any('INSERT INTO "counterapp_parcelsperproject"' in query["sql"] for query in logged)
    assert any('INSERT INTO "counterapp_parcelsperproject"' in sql for sql in seen)
    with transaction.atomic():
        Parcel.objects.create(project=project, size=1)
    assert ParcelsPerProject.objects.get(project=project).total == 3


@committing
def test_an_error_in_the_fold_reaches_the_caller_and_undoes_the_write(project):
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE counterapp_parcelsperproject ADD CONSTRAINT few CHECK (bytes < 10)")
    try:
        with pytest.raises(IntegrityError, match="few"), transaction.atomic():
            Parcel.objects.create(project=project, size=50)
    finally:
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE counterapp_parcelsperproject DROP CONSTRAINT few")
    assert not Parcel.objects.exists()
    Parcel.objects.create(project=project, size=50)
    assert_same_totals(ParcelsPerProject)


@committing
def test_other_models_pay_nothing_and_delete_fast(project):
    Tag.objects.bulk_create([Tag(name=str(i)) for i in range(3)])
    with CaptureQueriesContext(
        connection,
    ) as queries:
        Owner.objects.create(name="b")
        Tag.objects.filter(name="1").update(name="x")
    assert len(queries) == 2
    Upload.objects.bulk_create([Upload(project=project, size=i) for i in range(5)])
    with CaptureQueriesContext(connection) as queries:
        Upload.objects.filter(project=project)._raw_delete("default")
    # The DELETE, and one statement for each counter that it concerns.
    assert sum("DELETE FROM" in q["sql"] for q in queries) == 1


@committing
def test_an_update_of_columns_that_no_counter_reads_is_left_alone(project):
    Upload.objects.create(project=project)
    with CaptureQueriesContext(connection) as queries:
        Upload.objects.update(filename="x")
    assert [q["sql"] for q in queries] == ['UPDATE "counterapp_upload" SET "filename" = \'x\'']


class InATestCase(TestCase):
    """A test's own transaction never commits; its writes count as if they did."""

    def test_rows_are_right_at_once(self):
        project = Project.objects.create(name="a")
        upload = Upload.objects.create(project=project, size=3)
        assert UploadsPerProject.objects.get(project=project).total == 1
        with transaction.atomic():
            upload.delete()
            assert UploadsPerProject.objects.get(project=project).total == 1
        assert UploadsPerProject.objects.get(project=project).total == 0
        Delivery.objects.create(project=project)
        assert UploadsPerProject.objects.count() == 1


@committing
def test_pages_are_counted_by_a_counter_that_covers_the_filter(project):
    Upload.objects.bulk_create([Upload(project=project, size=i) for i in range(7)] + [Upload()])
    pages = CounterPaginator(Upload.objects.filter(project=project).order_by("pk"), 3)
    with CaptureQueriesContext(connection) as queries:
        assert (pages.count, pages.num_pages) == (7, 3)
    assert all('FROM "counterapp_upload"' not in q["sql"] for q in queries)
    assert pages.explain() == f"count: counterapp.UploadsPerProject.total (project={project.pk})"
    assert CounterPaginator(Upload.objects.order_by("pk"), 3).count == 8
    assert "UploadsInAll.total (all rows)" in CounterPaginator(Upload.objects.order_by("pk"), 3).explain()
    assert CounterPaginator(Upload.objects.filter(project=None).order_by("pk"), 3).count == 1


@committing
@pytest.mark.parametrize(
    "narrow",
    [
        lambda q: q.filter(size=3),
        lambda q: q.filter(size__gt=3),
        lambda q: q.filter(project__name="a"),
        lambda q: q.exclude(project=1),
        lambda q: q.filter(models.Q(project=1) | models.Q(project=2)),
        lambda q: q.filter(project=F("size")),
        lambda q: q.annotate(n=Count("tags")),
        lambda q: q.distinct(),
        lambda q: q[:3],
        lambda q: q.none(),
        lambda q: q.filter(project=1).filter(kind="x"),
    ],
)
def test_what_no_counter_covers_is_counted(project, narrow):
    Upload.objects.bulk_create([Upload(project=project, size=i) for i in range(7)])
    queryset = narrow(Upload.objects.order_by("pk"))
    assert cover(queryset) is None
    assert CounterPaginator(queryset, 3).count == queryset.count()
    assert "no counter covers" in CounterPaginator(queryset, 3).explain()


@committing
def test_joins_and_ordinary_queries(project):
    Upload.objects.create(project=project, size=5)
    assert Project.objects.get(uploadsperproject__total=1) == project
    assert UploadsPerProject.objects.select_related("project").get().project == project
    DownloadsEver.objects.update(total=F("total") + 1)
    admin = CounterAdmin(UploadsPerProject, AdminSite())
    assert admin.get_list_display(None) == ["project_id", "total", "bytes"]
    assert not admin.has_add_permission(None)


# -- migrations


def state():
    from django.db.migrations.loader import MigrationLoader

    return MigrationLoader(connection).project_state()


def functions():
    with connection.cursor() as cursor:
        prefix = triggers.prefix(definition(DeliveriesPerProject, connection))
        cursor.execute("SELECT count(*) FROM pg_proc WHERE starts_with(proname, %s)", [prefix])
        return cursor.fetchone()[0]


@committing
def test_migrations_are_without_drift():
    call_command("makemigrations", "counterapp", check=True, dry_run=True, verbosity=0)


@committing
def test_triggers_go_and_come_back_with_their_operation(project):
    before: ProjectState = state()
    after = before.clone()
    operation = AlterCounterTriggers("DeliveriesPerProject", None)
    operation.state_forwards("counterapp", after)
    with connection.schema_editor() as editor:
        operation.database_forwards("counterapp", editor, before, after)
    assert functions() == 0
    found = [m for m in run_checks(databases=["default"]) if m.id == "django_scaledb.W041"]
    assert [m.obj for m in found] == [DeliveriesPerProject]
    Delivery.objects.create(project=project)
    assert DeliveriesPerProject.objects.count() == 0
    with connection.schema_editor() as editor:
        operation.database_backwards("counterapp", editor, after, before)
    assert functions() > 0
    call_command("rebuild_counters", "counterapp.DeliveriesPerProject", verbosity=0)
    Delivery.objects.create(project=project)
    assert_same_totals(DeliveriesPerProject)
    assert not [m for m in run_checks(databases=["default"]) if m.id == "django_scaledb.W041"]


@committing
def test_a_deleted_counter_leaves_its_source_alone(project):
    found = state()
    model = found.apps.get_model("counterapp", "DeliveriesPerProject")
    with connection.schema_editor() as editor:
        editor.delete_model(model)
    try:
        assert functions() == 0
        Delivery.objects.create(project=project)
    finally:
        with connection.schema_editor() as editor:
            editor.create_model(model)
            editor.set_counter_triggers(model)
    call_command("rebuild_counters", "counterapp.DeliveriesPerProject", verbosity=0)
    assert_same_totals(DeliveriesPerProject)


@committing
def test_data_migrations_count(project):
    Old = state().apps.get_model("counterapp", "Upload")
    Old.objects.create(project_id=project.pk, size=4)
    Old.objects.filter(size=4).update(project_id=None)
    assert_same_totals(UploadsPerProject, UploadsPerOwner)
    assert UploadsPerProject.objects.get(project=None).total == 1


def test_outdated_triggers_are_seen(db):
    found = definition(DeliveriesPerProject, connection)
    with connection.cursor() as cursor:
        cursor.execute(
            f"COMMENT ON FUNCTION {triggers.prefix(found)}_fold() IS 'django_scaledb counter x 0000'"
        )
    (message,) = [m for m in run_checks(databases=["default"]) if m.id == "django_scaledb.W041"]
    assert "are not what its CounterMeta says" in message.msg
