"""What applications do with a database, for tests that ask what is read afterwards.

`WRITES` write, `READS` look as if they might and do not, `SEEN` write, read what they wrote, and check it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable

import pytest
from django.contrib.auth.models import User
from django.db import connection, connections, transaction
from django.db.models import F, Func, IntegerField

from django_scaledb.routing import use_primary
from django_scaledb.testing import Cluster
from tests.testapp.models import Account, Event, Tag


def prepare(cluster: Cluster) -> None:
    """What the operations need of a migrated database, on its standbys too."""
    cluster.primary.execute(
        "CREATE FUNCTION writes() RETURNS int LANGUAGE sql AS "
        "$$ INSERT INTO testapp_account (name) VALUES ('by function') RETURNING 1 $$",
        dbname="app",
    )
    cluster.primary.execute("INSERT INTO testapp_account (name) VALUES ('old')", dbname="app")
    cluster.primary.execute("CREATE VIEW writing AS SELECT writes() AS n", dbname="app")
    cluster.primary.execute("GRANT SELECT ON writing TO app", dbname="app")
    cluster.primary.execute(
        "INSERT INTO auth_user (username, password, is_superuser, is_staff, is_active, first_name, "
        "last_name, email, date_joined) VALUES ('old', '', false, false, true, '', '', '', now())",
        dbname="app",
    )
    cluster.wait_for_catchup()


def where() -> str:
    return Account.objects.all().db


def account(name: str = "x") -> Account:
    """One that is on both servers: made without this context's knowledge."""
    with connections["default"].cursor() as cursor:
        tracker, cursor.cursor.routing_tracker = cursor.cursor.routing_tracker, None
        cursor.execute("INSERT INTO testapp_account (name) VALUES (%s) RETURNING id", [name])
        (pk,) = cursor.fetchone()
        cursor.cursor.routing_tracker = tracker
    return Account(pk=pk, name=name)


def raw(sql: str) -> Callable[[], None]:
    def run() -> None:
        with connection.cursor() as cursor:
            cursor.execute(sql)

    return run


def _copy() -> None:
    with connection.cursor() as cursor, cursor.copy("COPY testapp_account (name) FROM STDIN") as copy:
        copy.write_row(["copied"])


def atomic(*operations: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        with transaction.atomic():
            for operation in operations:
                operation()

    return run


def _manual() -> None:
    transaction.set_autocommit(False)
    try:
        Account.objects.create(name="manual")
        transaction.commit()
    finally:
        transaction.set_autocommit(True)


def _savepoint() -> None:
    with transaction.atomic():
        try:
            with transaction.atomic():
                Account.objects.create(name="undone")
                raise LookupError
        except LookupError:
            Account.objects.create(name="kept")


def _async_commit() -> None:
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("SET LOCAL synchronous_commit = off")
        Account.objects.create(name="soon on disk")


def _function() -> None:
    list(Tag.objects.using("default").annotate(n=Func(function="writes", output_field=IntegerField()))[:1])


INSERT = "INSERT INTO testapp_account (name) VALUES ('raw')"
WRITES: dict[str, Callable[[], object]] = {
    "create": lambda: Account.objects.create(name="a"),
    "save": lambda: Account(name="a").save(),
    "save using": lambda: Account(name="a").save(using="default"),
    "using": lambda: Account.objects.using("default").create(name="a"),
    "update": lambda: Account.objects.exclude(name="old").update(name="b"),
    "update F": lambda: Account.objects.update(name=F("name")),
    "bulk_create": lambda: Account.objects.bulk_create([Account(name=str(n)) for n in range(3)]),
    "delete": lambda: Account.objects.filter(name="nobody").delete() and account("d").delete(),
    "queryset delete": lambda: (
        account("gone") and Account.objects.using("default").filter(name="gone").delete()
    ),
    "get_or_create": lambda: Account.objects.get_or_create(name="new one"),
    "update_or_create": lambda: Account.objects.update_or_create(name="new two"),
    "many to many": lambda: _tagged(),
    "raw": raw(INSERT),
    "raw with": raw(f"WITH added AS ({INSERT} RETURNING id) SELECT * FROM added"),
    "raw several": raw(f"SELECT 1; {INSERT}"),
    "raw comment": raw(f"/* note */ -- more\n{INSERT}"),
    "raw do": raw(f"DO $$ BEGIN {INSERT}; END $$"),
    "raw by hand": raw(f"BEGIN; {INSERT}; COMMIT"),
    "raw function": raw("SELECT writes()"),
    "raw explain": raw(f"EXPLAIN ANALYZE {INSERT}"),
    "ddl": raw("CREATE TABLE IF NOT EXISTS made (n int)"),
    "copy": _copy,
    "atomic": atomic(lambda: Account.objects.create(name="a")),
    "atomic raw function": atomic(raw("SELECT writes()")),
    "atomic view that writes": atomic(raw("SELECT * FROM writing")),
    "atomic copy": atomic(_copy),
    "autocommit off": _manual,
    "savepoint": _savepoint,
    "synchronous_commit=off": _async_commit,
}


def _tagged() -> None:
    event = Event.objects.create(happened_at="2026-11-01T00:00Z", size=1)
    event.tags.add(Tag.objects.create(name="t"))


READS: dict[str, Callable[[], object]] = {
    "instance": lambda: Account(name="a"),
    "related instance": lambda: Event(account=account()),
    "full_clean": lambda: Event(account=old(), happened_at="2026-11-01T00:00Z").full_clean(),
    "get_or_create hit": lambda: Account.objects.get_or_create(pk=old().pk),
    "read-only transaction": atomic(lambda: list(Account.objects.all()[:3])),
    "read-only raw transaction": atomic(raw("SELECT count(*) FROM testapp_account WHERE name = 'INSERT'")),
    "raw read": raw("SELECT upper(name) FROM testapp_account"),
    "raw read of an unknown function": raw("SELECT pg_advisory_unlock_all()"),
    "rollback": lambda: _rolled_back(),
    "failed write": lambda: _failing(),
    "set": raw("SET work_mem = '4MB'"),
    "using the primary": lambda: list(Account.objects.using("default")[:1]),
    "primary block": lambda: _in_primary(),
    "iterator": lambda: list(Account.objects.using("default").iterator()),
    "refresh": lambda: old().refresh_from_db(),
}


def old() -> Account:
    """One that is on both servers."""
    return Account.objects.using("replica1").get(name="old")


def _rolled_back() -> None:
    with transaction.atomic():
        Account.objects.create(name="never")
        transaction.set_rollback(True)


def _failing() -> None:
    with pytest.raises(Exception, match="does not exist"):
        raw("INSERT INTO nowhere VALUES (1)")()


def _in_primary() -> None:
    with use_primary():
        list(Account.objects.all()[:1])


# Read at once


def _name() -> str:
    return uuid.uuid4().hex


def _make() -> Account:
    return Account.objects.create(name=_name())


def _event(account: Account) -> Event:
    return Event(account=account, happened_at="2026-11-01T00:00Z", size=1)


def _names(*pks: int) -> list[str]:
    return list(Account.objects.filter(pk__in=pks).order_by("pk").values_list("name", flat=True))


def _see_create() -> None:
    made = _make()
    assert Account.objects.get(pk=made.pk) == made
    assert Account.objects.get(pk=made.pk)._state.db == "default"


def _see_atomic() -> None:
    with transaction.atomic():
        made = _make()
        assert _names(made.pk) == [made.name]
    assert _names(made.pk) == [made.name]


def _see_select_for_update() -> None:
    made = _make()
    with transaction.atomic():
        locked = Account.objects.select_for_update().get(pk=made.pk)
        locked.name = _name()
        locked.save()
    assert _names(made.pk) == [locked.name]


def _see_update() -> None:
    new, made = _name(), account()
    assert Account.objects.filter(pk=made.pk).update(name=new) == 1
    assert _names(made.pk) == [new]


def _see_bulk() -> None:
    made = Account.objects.bulk_create([Account(name=_name()) for _ in range(3)])
    pks = [each.pk for each in made]
    assert _names(*pks) == [each.name for each in made]
    for each in made:
        each.name = _name()
    Account.objects.bulk_update(made, ["name"])
    assert _names(*pks) == [each.name for each in made]


def _see_delete() -> None:
    made = _make()
    assert _names(made.pk)
    made.delete()
    assert not Account.objects.filter(name=made.name).exists()


def _see_raw() -> None:
    new = _name()
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO testapp_account (name) VALUES (%s)", [new])
    assert Account.objects.filter(name=new).exists()


def _see_using() -> None:
    made = Account.objects.using("default").create(name=_name())
    assert _names(made.pk) == [made.name]


def _see_get_or_create() -> None:
    name = _name()
    made, created = Account.objects.get_or_create(name=name)
    assert created
    assert Account.objects.get_or_create(name=name) == (made, False)
    assert _names(made.pk) == [name]


def _see_update_or_create() -> None:
    name, new = _name(), _name()
    made, created = Account.objects.update_or_create(name=name)
    assert created
    assert Account.objects.update_or_create(pk=made.pk, defaults={"name": new}) == (made, False)
    assert _names(made.pk) == [new]


def _see_related() -> None:
    made = _make()
    event = made.event_set.create(happened_at="2026-11-01T00:00Z", size=1)
    assert list(made.event_set.all()) == [event]
    tag = event.tags.create(name=_name())
    assert list(event.tags.all()) == [tag]
    event.tags.clear()
    assert not event.tags.exists()
    assert Event.objects.get(pk=event.pk).account == made


def _see_refresh() -> None:
    mine = User.objects.get(username="old")
    assert mine._state.db == "replica1"
    new = _name()
    with connection.cursor() as cursor:
        cursor.execute("UPDATE auth_user SET last_name = %s WHERE id = %s", [new, mine.pk])
    mine.refresh_from_db()
    assert mine.last_name == new


def _see_saved_instance() -> None:
    mine = User.objects.get(username="old")
    assert mine._state.db == "replica1"
    mine.first_name = _name()
    mine.save()
    assert User.objects.get(username="old").first_name == mine.first_name


def _see_full_clean() -> None:
    _event(_make()).full_clean()


def _see_rollback() -> None:
    made = _make()
    with transaction.atomic():
        Account.objects.filter(pk=made.pk).update(name="never")
        transaction.set_rollback(True)
    assert _names(made.pk) == [made.name]


def _see_savepoint() -> None:
    made, new = account(), _name()
    with transaction.atomic():
        Account.objects.filter(pk=made.pk).update(name=new)
        try:
            with transaction.atomic():
                Account.objects.filter(pk=made.pk).update(name="never")
                raise LookupError
        except LookupError:
            pass
    assert _names(made.pk) == [new]


def _see_async_commit() -> None:
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("SET LOCAL synchronous_commit = off")
        made = _make()
    assert _names(made.pk) == [made.name]


SEEN: dict[str, Callable[[], None]] = {
    "write and read": _see_create,
    "atomic": _see_atomic,
    "select_for_update": _see_select_for_update,
    "update": _see_update,
    "bulk_create and bulk_update": _see_bulk,
    "delete": _see_delete,
    "raw cursor": _see_raw,
    "using": _see_using,
    "get_or_create": _see_get_or_create,
    "update_or_create": _see_update_or_create,
    "related managers": _see_related,
    "refresh_from_db": _see_refresh,
    "an instance read from a replica and saved": _see_saved_instance,
    "full_clean of a foreign key": _see_full_clean,
    "rollback": _see_rollback,
    "savepoint": _see_savepoint,
    "synchronous_commit=off": _see_async_commit,
}
