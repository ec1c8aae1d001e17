"""The Django application."""

from django.apps import AppConfig
from django.db.models.signals import pre_migrate

from django_scaledb.backend.psqlextra import lift_engine_guard, route_managers_through_the_engine

# Now, not in ready(): django-postgres-extra's models may be imported before ours.
lift_engine_guard()
route_managers_through_the_engine()


class ScaleDBConfig(AppConfig):
    name = "django_scaledb"
    verbose_name = "django_scaledb"

    def ready(self) -> None:
        from django_scaledb import checks  # noqa: F401  # registers them
        from django_scaledb.backend import counted_partitions
        from django_scaledb.counters import autodetector as counter_autodetector
        from django_scaledb.partitions import autodetector, watching
        from django_scaledb.partitions.conversion import migrate

        autodetector.install()
        counter_autodetector.install()
        counted_partitions.install()
        watching.install()
        pre_migrate.connect(migrate.on_pre_migrate, sender=self)
