"""The table in which commands keep how they ended, and the overview page's permission."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("django_scaledb", "0001_conversion")]

    operations = [
        migrations.CreateModel(
            name="LastRun",
            fields=[
                ("id", models.BigAutoField(primary_key=True, serialize=False)),
                ("kind", models.TextField()),
                ("subject", models.TextField()),
                ("finished_at", models.DateTimeField()),
                ("ok", models.BooleanField()),
                ("succeeded_at", models.DateTimeField(null=True)),
                ("detail", models.JSONField(default=dict)),
            ],
            options={
                "db_table": "django_scaledb_last_run",
                "default_permissions": (),
                "constraints": [
                    models.UniqueConstraint(fields=("kind", "subject"), name="django_scaledb_one_last_run")
                ],
            },
        ),
        migrations.CreateModel(
            name="Overview",
            fields=[],
            options={
                "verbose_name": "overview",
                "verbose_name_plural": "overview",
                "default_permissions": ("view",),
                "proxy": True,
                "indexes": [],
                "constraints": [],
            },
            bases=("django_scaledb.lastrun",),
        ),
    ]
