"""Load the upload history that comes with the example."""

import csv
import gzip
from datetime import datetime
from itertools import islice
from pathlib import Path

from django.conf import settings
from django.core.management.base import BaseCommand
from django.db import connection
from django_scaledb.progress import progress

from pypi.models import Project, Upload

DEFAULT_PATH = settings.BASE_DIR / "data" / "pypi_uploads.csv.gz"
BATCH = 5_000


class Command(BaseCommand):
    help = "Loads uploaded files from a CSV file; rows that are there already stay as they are."

    def add_arguments(self, parser):
        parser.add_argument("path", nargs="?", type=Path, default=DEFAULT_PATH)

    def handle(self, *, path, **options):
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        project_ids = ensure_projects({row["project"] for row in rows})
        uploads = (upload(row, project_ids) for row in progress(rows, total=len(rows), label="loading"))
        while batch := list(islice(uploads, BATCH)):
            # One INSERT; PostgreSQL sends each row to its partition. A row that an earlier run has
            # loaded meets the unique constraint and is left out.
            Upload.objects.bulk_create(batch, ignore_conflicts=True)
        with connection.cursor() as cursor:
            # Autovacuum analyzes partitions, never the partitioned table itself.
            cursor.execute(f"ANALYZE {connection.ops.quote_name(Upload._meta.db_table)}")
        self.stdout.write(f"{Upload.objects.count():,} rows in {Upload._meta.db_table}")


def ensure_projects(names: set[str]) -> dict[str, int]:
    Project.objects.bulk_create((Project(name=name) for name in sorted(names)), ignore_conflicts=True)
    return dict(Project.objects.filter(name__in=names).values_list("name", "id"))


def upload(row: dict[str, str], project_ids: dict[str, int]) -> Upload:
    return Upload(
        project_id=project_ids[row["project"]],
        version=row["version"],
        filename=row["filename"],
        packagetype=row["packagetype"],
        python_version=row["python_version"],
        size=int(row["size"]),
        uploaded_at=datetime.fromisoformat(row["uploaded_at"]),
        yanked=row["yanked"] == "True",
    )
