"""psycopg's pool in the settings, in a threaded server: what docs/how-to/pool.md says."""

from __future__ import annotations

import json

import pytest

from tests.proofs.load import application, put_under_load, workers
from tests.proofs.site import Site
from tests.proofs.test_serve import serve
from tests.routing import eventually

pytestmark = pytest.mark.cluster

PAGE = "how-to/pool.md"
MODELS = """
    from django.db.models import Count
    from django_scaledb.models import CounterModel

    class Order(models.Model):
        status = models.CharField(max_length=50)

    class OrdersPerStatus(CounterModel):
        class CounterMeta:
            source = "shop.Order"
            group_by = ["status"]
            totals = {"total": Count("*")}

    class Event(PartitionedModel):
        at = models.DateTimeField()

        class PartitioningMeta:
            key = ["at"]
            interval = "1 month"
            retention = "2 months"
            retention_action = "detach"
"""


@pytest.mark.slow
def test_a_pool_behind_a_threaded_server(site: Site) -> None:
    commands = site.take(PAGE)
    application(site, MODELS, read_before_the_fork=False)
    program, port = serve(site, "gunicorn shop.wsgi --workers 2 --worker-class gthread --threads 3")
    workers(port, 2)
    with site.lag(1):
        load = put_under_load(port)
    assert (load.errors, load.stale) == ([], [])
    assert load.strangers[False] > 0, "who has no cookie sees the lag"
    load = put_under_load(port, at_half=site.standby.kill)
    try:
        assert (load.errors, load.stale) == ([], [])
        again = put_under_load(port, rounds=1)
        assert (again.errors, again.stale) == ([], []), "a pool of dead connections"
        assert set(again.read_from) == {"default"}
    finally:
        site.standby.restart()
    eventually(lambda: workers(port, 2), 20)
    total = dict(site.query("SELECT status, total FROM shop_ordersperstatus WHERE total <> 0"))
    assert total == dict(site.query("SELECT status, count(*) FROM shop_order GROUP BY status"))
    assert sum(total.values()) == 6 * 8 * 2 + 6
    assert "Traceback" not in program.output, program.output
    _rotates(site, commands)


def _rotates(site: Site, commands: list[str]) -> None:
    site.run(
        "from django.core.management import call_command\n"
        "call_command('create_partitions', '--from', '2020-01-01', '--to', '2020-02-01')"
    )
    rotate, show = (command.removeprefix("python manage.py ") for command in commands)
    assert "shop.Event: detached public.shop_event_y2020m01" in site.manage(rotate)
    # In the session that goes back to the pool nothing is left of the run.
    left = site.run(
        """
        import json
        from django.core.management import call_command
        from django.db import connection, connections
        call_command("create_partitions", "--from", "2020-01-01", "--to", "2020-02-01", verbosity=0)
        call_command("rotate_partitions", verbosity=0)
        connection.close()
        with connection.cursor() as cursor:
            cursor.execute("SELECT current_setting('application_name'), current_setting('statement_timeout'),"
                           " (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory')")
            print(json.dumps(cursor.fetchone()))
        connection.close()
        connection.close_pool()
        """
    )
    assert json.loads(left.splitlines()[-1]) == ["", "0", 0]
    assert "replica1  replica  ok" in site.manage(*show.split())
