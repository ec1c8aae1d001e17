"""What the admin's overview page costs when there is much to show.

Makes MODELS partitioned tables of PARTITIONS days each, and asks for the page twice: with nothing to do
for the next rotation, and a month later, when there is much.

Printed: queries, the best of three times in seconds, and what the page weighs.
"""

from __future__ import annotations

import argparse
import time
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest import mock

import django
from django.conf import settings
from django.urls import path

from django_scaledb.testing import Cluster

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
urlpatterns: list[Any] = []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=int, default=50)
    parser.add_argument("--partitions", type=int, default=200)
    options = parser.parse_args()
    with Cluster(standbys=0, settings={"max_locks_per_transaction": 1000}) as cluster:
        configure(cluster)
        make(options.models, options.partitions)
        print(f"{options.models} models of {options.partitions} partitions")
        now = datetime.now(UTC)
        report("nothing is due", now)
        report("a month later", now + timedelta(days=30))


def configure(cluster: Cluster) -> None:
    settings.configure(
        SECRET_KEY="x",
        USE_TZ=True,
        ALLOWED_HOSTS=["*"],
        DATABASES={"default": cluster.primary.django_settings()},
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        INSTALLED_APPS=[
            *(f"django.contrib.{name}" for name in ("admin", "auth", "contenttypes", "messages", "sessions")),
            "django_scaledb",
        ],
        MIDDLEWARE=[
            "django.contrib.sessions.middleware.SessionMiddleware",
            "django.contrib.auth.middleware.AuthenticationMiddleware",
            "django.contrib.messages.middleware.MessageMiddleware",
        ],
        ROOT_URLCONF=__name__,
        STATIC_URL="static/",
        TEMPLATES=TEMPLATES,
    )
    django.setup()
    from django.contrib import admin
    from django.core.management import call_command

    urlpatterns.append(path("admin/", admin.site.urls))
    call_command("migrate", verbosity=0)


def make(count: int, partitions: int) -> None:
    """Models and their tables; the last two partitions lie ahead."""
    from django.db import connection, models

    from django_scaledb.models import PartitionedModel

    class PartitioningMeta:
        key = ["at"]
        interval = "1 day"
        retention = f"{partitions} days"

    first = datetime.now(UTC).date() - timedelta(days=partitions - 3)
    for number in range(count):
        meta = type("Meta", (), {"app_label": "django_scaledb", "db_table": f"bench_{number}"})
        members = {"__module__": __name__, "Meta": meta, "PartitioningMeta": PartitioningMeta}
        type(f"Bench{number}", (PartitionedModel,), {**members, "at": models.DateTimeField()})
        with connection.cursor() as cursor:
            cursor.execute(
                f"CREATE TABLE bench_{number} (id bigint, at timestamptz NOT NULL, PRIMARY KEY (id, at)) "
                "PARTITION BY RANGE (at)"
            )
            cursor.execute(
                f"""
                DO $$ BEGIN FOR i IN 0..{partitions - 1} LOOP
                    EXECUTE format('CREATE TABLE bench_{number}_%s PARTITION OF bench_{number} FOR VALUES '
                        'FROM (%L) TO (%L)', i, ('{first} 00:00+00'::timestamptz + i * interval '24 hours'),
                        ('{first} 00:00+00'::timestamptz + (i + 1) * interval '24 hours'));
                    EXECUTE format('COMMENT ON TABLE bench_{number}_%s IS %L',
                        i, 'psqlextra_auto_partitioned');
                END LOOP; END $$
                """
            )


def report(when: str, now: datetime) -> None:
    from django.contrib.auth.models import User
    from django.db import connection
    from django.test import Client
    from django.test.utils import CaptureQueriesContext
    from django.urls import reverse
    from django.utils import timezone

    client = Client()
    times = []
    with mock.patch.object(timezone, "now", return_value=now):
        client.force_login(User.objects.get_or_create(username="a", is_staff=True, is_superuser=True)[0])
        for _ in range(3):
            with CaptureQueriesContext(connection) as captured:
                begun = time.perf_counter()
                response = client.get(reverse("admin:django_scaledb_overview"))
                times.append(time.perf_counter() - begun)
            assert response.status_code == 200
    weight = len(response.content) / 1000
    print(f"{when:<16}{len(captured):4d} queries  {min(times):6.2f} s  {weight:6.0f} kB")


if __name__ == "__main__":
    main()
