"""The table in which conversions keep where they stand."""

from django.db import migrations, models


class Migration(migrations.Migration):
    initial = True

    dependencies = []

    operations = [
        migrations.CreateModel(
            name="Conversion",
            fields=[
                ("id", models.BigAutoField(primary_key=True, serialize=False)),
                ("model", models.TextField()),
                ("table_schema", models.TextField()),
                ("table_name", models.TextField()),
                ("strategy", models.TextField()),
                ("phase", models.TextField(default="preparing")),
                ("step", models.TextField(default="")),
                ("rows_done", models.BigIntegerField(default=0)),
                ("rows_total", models.BigIntegerField(default=0)),
                ("details", models.JSONField(default=dict)),
                ("begun_at", models.DateTimeField(auto_now_add=True)),
                ("changed_at", models.DateTimeField(auto_now=True)),
                ("ended_at", models.DateTimeField(null=True)),
            ],
            options={
                "db_table": "django_scaledb_conversion",
                "constraints": [
                    models.UniqueConstraint(
                        condition=models.Q(("ended_at", None)),
                        fields=("table_schema", "table_name"),
                        name="django_scaledb_one_conversion",
                    )
                ],
            },
        ),
    ]
