"""Random mixes of writes, transactions and savepoints: every counter equals its GROUP BY at every commit."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from django.db import connection, transaction
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from django_scaledb.counters.registry import counters
from django_scaledb.testing.counters import assert_same_totals
from tests.counterapp.models import (
    DeliveriesPerOwner,
    DeliveriesPerProject,
    Delivery,
    Owner,
    Project,
    Upload,
    UploadsPerProject,
)

pytestmark = pytest.mark.django_db(transaction=True)
SIZES = st.sampled_from([None, 0, 7, 150])
KINDS = st.sampled_from(["sdist", "wheel", "100% \\ 'hidden'"])
FLAGS = st.sampled_from([False, True, None])


class Writes(RuleBasedStateMachine):
    """Both sources are written alike; blocks are opened and closed at any moment."""

    def __init__(self):
        super().__init__()
        self.blocks = []

    @initialize()
    def empty(self):
        for model in (Upload, Delivery, Project, Owner):
            model.objects.all().delete()
        self.owners = [Owner.objects.create(name=n, country=n) for n in "xy"]
        self.projects = [
            Project.objects.create(name=n, owner=o) for n, o in zip("abc", [*self.owners, None], strict=True)
        ]

    def some(self, data, model):
        rows = list(model.objects.order_by("pk"))
        return data.draw(st.sampled_from(rows)) if rows else None

    def project(self, data):
        return data.draw(st.sampled_from([*Project.objects.order_by("pk"), None]))

    @rule(data=st.data(), size=SIZES, kind=KINDS, yanked=FLAGS)
    def create(self, data, size, kind, yanked):
        project = self.project(data)
        for model in (Upload, Delivery):
            model.objects.create(project=project, size=size, kind=kind, yanked=yanked)

    @rule(data=st.data(), count=st.integers(1, 5))
    def bulk_upsert(self, data, count):
        project = self.project(data)
        for model in (Upload, Delivery):
            model.objects.bulk_create(
                [model(project=project, size=i, filename=f"f{i}") for i in range(count)],
                update_conflicts=True,
                unique_fields=["filename"],
                update_fields=["project", "size"],
            )

    @rule(data=st.data(), size=SIZES)
    def save(self, data, size):
        for model in (Upload, Delivery):
            row = self.some(data, model)
            if row is not None:
                row.project, row.size, row.yanked = self.project(data), size, False
                row.save()

    @rule(data=st.data())
    def delete(self, data):
        for model in (Upload, Delivery):
            row = self.some(data, model)
            if row is not None:
                row.delete()

    @rule(data=st.data(), size=SIZES, yanked=FLAGS)
    def update(self, data, size, yanked):
        project = self.project(data)
        for model in (Upload, Delivery):
            model.objects.filter(size=size).update(project=project, yanked=yanked)

    @rule(kind=KINDS)
    def delete_some(self, kind):
        for model in (Upload, Delivery):
            model.objects.filter(kind=kind).delete()

    @rule(data=st.data(), flip=st.booleans())
    def change_hands(self, data, flip):
        project = self.some(data, Project)
        if project is not None:
            project.owner = self.owners[flip]
            project.save()

    @rule(data=st.data())
    def delete_a_project(self, data):
        if Project.objects.count() > 1:
            self.some(data, Project).delete()

    @rule()
    def begin(self):
        if len(self.blocks) < 3:
            self.blocks.append(transaction.atomic())
            self.blocks[-1].__enter__()

    @rule(keep=st.booleans())
    def end(self, keep):
        if self.blocks:
            if not keep:
                transaction.set_rollback(True)
            self.blocks.pop().__exit__(None, None, None)
            self.check()

    def check(self):
        if not self.blocks:
            assert_same_totals(*counters())
        else:
            for project in Project.objects.all():
                row = UploadsPerProject.objects.for_key(project=project)
                assert row.total == Upload.objects.filter(project=project).count()
                row = DeliveriesPerProject.objects.for_key(project=project)
                assert row.total == Delivery.objects.filter(project=project).count()
            for owner in self.owners:
                row = DeliveriesPerOwner.objects.for_key(owner=owner, country=owner.country)
                assert row.total == Delivery.objects.filter(project__owner=owner).count()

    def teardown(self):
        while self.blocks:
            self.blocks.pop().__exit__(None, None, None)
        self.check()


def run_machine(examples, steps):
    run_state_machine_as_test(
        Writes,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=examples < 20,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_random_histories_are_exact():
    run_machine(8, 20)


@pytest.mark.slow
def test_many_random_histories_are_exact():
    run_machine(150, 40)


WRITER = """
    import random, sys
    from django.conf import settings
    import tests.settings as base
    conf = {k: getattr(base, k) for k in dir(base) if k.isupper()}
    conf["DATABASES"] = {"default": eval(sys.argv[1])}
    settings.configure(**conf)
    import django
    django.setup()
    from django.db import transaction
    from tests.counterapp.models import Delivery, Project, Upload
    chance = random.Random(sys.argv[2])
    projects = list(Project.objects.order_by("pk"))
    print("ready", flush=True)
    while True:
        with transaction.atomic():
            for _ in range(chance.randrange(1, 4)):
                with transaction.atomic():
                    for model in (Upload, Delivery):
                        pick = chance.choice(projects)
                        rows = [model(project=pick, size=i) for i in range(chance.randrange(1, 9))]
                        model.objects.bulk_create(rows)
                        model.objects.filter(size=chance.randrange(8), project=pick).delete()
                    if chance.random() < 0.2:
                        transaction.set_rollback(True)
            if chance.random() < 0.1:
                transaction.set_rollback(True)
"""


def killed_writers(rounds, writers=4):
    owner = Owner.objects.create(name="x", country="x")
    for name in "abcd":
        Project.objects.create(name=name, owner=owner)
    chance = random.Random(1)
    entry = {
        k: v
        for k, v in connection.settings_dict.items()
        if k in ("ENGINE", "HOST", "PORT", "USER", "PASSWORD", "NAME")
    }
    entry["TEST"] = {}
    for number in range(rounds):
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(WRITER), repr(entry), f"{number}.{i}"],
                stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
            for i in range(writers)
        ]
        for process in processes:
            assert process.stdout.readline() == b"ready\n"
        time.sleep(chance.uniform(0.3, 1.0))
        for process in processes:
            process.send_signal(signal.SIGKILL)
        for process in processes:
            process.wait()
            process.stdout.close()
        with connection.cursor() as cursor:
            for _ in range(100):
                cursor.execute(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                    "AND pid <> pg_backend_pid()"
                )
                if not cursor.fetchone()[0]:
                    break
                time.sleep(0.05)
        assert Upload.objects.count() + Delivery.objects.count() > 0
        assert_same_totals(*counters())


def test_writers_killed_at_any_moment_leave_exact_counters():
    killed_writers(1, writers=2)


@pytest.mark.slow
def test_writers_killed_again_and_again():
    killed_writers(15)
