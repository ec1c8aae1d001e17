"""Writers and readers through Django, each with a ledger of its own, while something is done to their table.

Run in a process of its own: ``python -m tests.traffic STOP_FILE WRITERS READERS FIRST_OWNER``, with the
project of `tests.project` as DJANGO_SETTINGS_MODULE. Ends when STOP_FILE appears, compares the ledgers
with the table row by row and prints what it saw as JSON.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tests.project import Project

ORDERS = """
    class Customer(models.Model):
        name = models.CharField(max_length=50)

    class Order(models.Model):
        customer = models.ForeignKey(Customer, on_delete=models.CASCADE)
        owner = models.IntegerField(default=0)
        slot = models.IntegerField(default=0)
        total = models.IntegerField(default=0)
        note = models.TextField(default="")
        placed_at = models.DateTimeField()

        class Meta:
            indexes = [
                models.Index(fields=["total"], name="order_total", condition=models.Q(total__gt=90)),
                models.Index(models.F("owner"), models.F("total").desc(), name="order_owner"),
            ]
            constraints = [
                models.CheckConstraint(condition=models.Q(total__gte=0), name="order_positive"),
                models.UniqueConstraint(fields=["owner", "slot", "placed_at"], name="order_once"),
            ]
"""
PARTITIONED_ORDERS = (
    ORDERS.replace("class Order(models.Model)", "class Order(PartitionedModel)")
    + """
        class PartitioningMeta:
            key = ["placed_at"]
            interval = "3 months"
            premake = 2
"""
)
FILL = """
INSERT INTO shop_customer (name) SELECT 'c' || i FROM generate_series(1, 100) i;
INSERT INTO shop_order (customer_id, owner, slot, total, note, placed_at)
SELECT 1 + i % 100, 0, i, i % 100, md5(i::text), now() - (i % 1000) * interval '1 day' - i * interval '1 ms'
FROM generate_series(1, {rows}) i;
CREATE VIEW dear AS SELECT id, total, placed_at FROM shop_order WHERE total > 90;
CREATE FUNCTION seen() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN NEW.note := NEW.note || '.'; RETURN NEW;
    END$$;
CREATE TRIGGER seen BEFORE UPDATE OF slot ON shop_order FOR EACH ROW EXECUTE FUNCTION seen();
COMMENT ON TABLE shop_order IS 'orders';
GRANT SELECT ON shop_order TO PUBLIC;
ANALYZE shop_order;
"""


ADOPTED = """
INSERT INTO shop_order (customer_id, owner, slot, total, note, placed_at)
SELECT 1 + i % 100, {owner}, -i, i % 100, 'made for its writer', now() - i * interval '7 days'
FROM generate_series(1, 100) i;
"""
MORE = """
INSERT INTO shop_order (customer_id, owner, slot, total, note, placed_at)
SELECT 1 + i % 100, 0, -i, i % 100, md5(i::text), now() - (i % 1000) * interval '1 day' - i * interval '1 ms'
FROM generate_series(1, {rows}) i;
"""


class Traffic:
    """A process with clients; `stop` answers with what they saw."""

    def __init__(
        self, project: Project, writers: int, readers: int, first_owner: int, pause: float = 0.002
    ) -> None:
        self.stop_file = project.folder / f"stop{first_owner}"
        source = Path(__file__).parent.parent
        environment = {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "project_settings",
            "PYTHONPATH": os.pathsep.join(map(str, (project.folder, source / "src", source))),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.traffic",
                str(self.stop_file),
                str(writers),
                str(readers),
                str(first_owner),
                str(pause),
            ],
            cwd=project.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n", self.process.communicate()[1]

    def stop(self) -> dict:
        self.stop_file.touch()
        out, err = self.process.communicate(timeout=120)
        assert self.process.returncode == 0, err
        return json.loads(out)


class Client(threading.Thread):
    def __init__(self, owner: int, stop: threading.Event, pause: float) -> None:
        super().__init__(daemon=True)
        self.owner = owner
        self.over = stop
        self.pause = pause
        self.random = random.Random(owner)
        self.errors: list[str] = []
        self.stalls: list[float] = []
        self.count = 0

    def run(self) -> None:
        from django.db import connection

        try:
            while not self.over.is_set():
                begun = time.monotonic()
                try:
                    self.act()
                except Exception as error:  # every error of a client counts
                    self.errors.append(f"{type(error).__name__}: {error}"[:300])
                    time.sleep(0.05)
                self.count += 1
                self.stalls.append(time.monotonic() - begun)
                time.sleep(self.pause)
        finally:
            connection.close()

    def act(self) -> None:
        raise NotImplementedError


class Writer(Client):
    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.ledger: dict[int, tuple[int, datetime]] = {}
        self.slots: dict[tuple[int, datetime], int] = {}
        self.on_replica = 0

    def adopt(self) -> None:
        """Take over the rows that were made for this writer beforehand."""
        from shop.models import Order

        for order in Order.objects.filter(owner=self.owner):
            self.ledger[order.id] = (order.total, order.placed_at)
            self.slots[order.slot, order.placed_at] = order.id

    def get(self, pk: int) -> Any:
        """The row, which must be as this writer left it, whichever server answers."""
        from shop.models import Order

        order = Order.objects.get(pk=pk)
        self.on_replica += order._state.db != "default"
        assert (order.total, order.placed_at) == self.ledger[pk], f"stale on {order._state.db}"
        return order

    def act(self) -> None:
        from shop.models import Order

        what = self.random.random()
        total = self.random.randrange(100)
        if what < 0.4 or not self.ledger:
            moment = datetime.now(UTC) - timedelta(days=self.random.randrange(900), microseconds=self.count)
            order = Order(
                customer_id=1 + total, owner=self.owner, slot=self.count, total=total, placed_at=moment
            )
            order.save()
            self.ledger[order.id] = (total, moment)
            self.slots[self.count, moment] = order.id
            self.get(order.id)
            return
        pk = self.random.choice(list(self.ledger))
        if what < 0.6:
            order = self.get(pk)
            order.total = total
            order.save()
            self.ledger[pk] = (total, order.placed_at)
        elif what < 0.7:
            updated = Order.objects.filter(pk=pk).update(total=total)
            assert updated == 1, f"{updated} rows updated"
            self.ledger[pk] = (total, self.ledger[pk][1])
        elif what < 0.8:
            slot, moment = self.random.choice(list(self.slots))
            row = Order(customer_id=1, owner=self.owner, slot=slot, total=total, placed_at=moment)
            Order.objects.bulk_create(
                [row],
                update_conflicts=True,
                unique_fields=["owner", "slot", "placed_at"],
                update_fields=["total"],
            )
            self.ledger[self.slots[slot, moment]] = (total, moment)
        else:
            count, _ = self.get(pk).delete()
            assert count == 1, f"{count} rows deleted"
            del self.ledger[pk]
            self.slots = {place: owner for place, owner in self.slots.items() if owner != pk}

    def compare(self) -> list[str]:
        from shop.models import Order

        rows = {
            pk: (total, at)
            for pk, total, at in Order.objects.filter(owner=self.owner).values_list(
                "pk", "total", "placed_at"
            )
        }
        count = Order.objects.filter(owner=self.owner).count()
        wrong = [
            f"{pk}: {rows.get(pk)} instead of {self.ledger.get(pk)}"
            for pk in rows.keys() | self.ledger.keys()
            if rows.get(pk) != self.ledger.get(pk)
        ]
        if count != len(rows):
            wrong.append(f"{count} rows with {len(rows)} ids")
        return wrong


class Reader(Client):
    def act(self) -> None:
        from django.db import connection
        from shop.models import Order

        pk = 1 + self.random.randrange(1000)
        assert Order.objects.get(pk=pk).owner == 0
        with connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM dear WHERE id BETWEEN %s AND %s", [pk, pk + 100])
            assert cursor.fetchone()[0] > 0


def main(stop_file: str, writers: int, readers: int, first: int, pause: float) -> None:
    import django

    django.setup()
    stop = threading.Event()
    working = [Writer(first + number, stop, pause) for number in range(writers)]
    clients = [*working, *(Reader(first + 1000 + number, stop, pause) for number in range(readers))]
    for writer in working:
        writer.adopt()
    for client in clients:
        client.start()
    print("ready", flush=True)
    while not os.path.exists(stop_file):
        time.sleep(0.05)
    stop.set()
    for client in clients:
        client.join(30)
    stalls = sorted(stall for client in clients for stall in client.stalls)
    json.dump(
        {
            "operations": sum(client.count for client in clients),
            "errors": [error for client in clients for error in client.errors],
            "wrong": [line for writer in working for line in writer.compare()],
            "on_replica": sum(writer.on_replica for writer in working),
            "rows": sum(len(writer.ledger) for writer in working),
            "longest": stalls[-1],
            "p99": stalls[int(len(stalls) * 0.99)],
            "stuck": sum(client.is_alive() for client in clients),
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]), float(sys.argv[5]))
