"""The table that knows what is in the archive."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("django_scaledb", "0002_last_run")]

    operations = [
        migrations.CreateModel(
            name="Archive",
            fields=[
                ("id", models.BigAutoField(primary_key=True, serialize=False)),
                ("model", models.TextField()),
                ("table_schema", models.TextField()),
                ("table_name", models.TextField()),
                ("partition_schema", models.TextField()),
                ("partition_name", models.TextField()),
                ("lower", models.TextField()),
                ("upper", models.TextField()),
                ("storage", models.TextField()),
                ("manifest", models.TextField()),
                ("file", models.TextField()),
                ("rows", models.BigIntegerField(default=0)),
                ("bytes", models.BigIntegerField(default=0)),
                ("begun_at", models.DateTimeField(auto_now_add=True)),
                ("archived_at", models.DateTimeField(null=True)),
                ("dropped_at", models.DateTimeField(null=True)),
                ("restored_at", models.DateTimeField(null=True)),
            ],
            options={
                "db_table": "django_scaledb_archive",
                "indexes": [
                    models.Index(fields=["table_schema", "table_name"], name="django_scaledb_archive_table")
                ],
            },
        ),
    ]
