"""Load the upload history that comes with the example."""

import gzip
from pathlib import Path

from django.conf import settings
from django.core.management.base import BaseCommand
from django.db import connection, transaction

from django_scaledb.progress import Progress
from pypi.models import Upload

DEFAULT_PATH = settings.BASE_DIR / "data" / "pypi_uploads.csv.gz"
CHUNK = 1 << 20

STAGE = """
    CREATE TEMPORARY TABLE incoming (
        project text, version text, filename text, packagetype text, python_version text,
        size bigint, uploaded_at timestamptz, yanked boolean
    ) ON COMMIT DROP
"""
INSERT_PROJECTS = """
    INSERT INTO pypi_project (name) SELECT DISTINCT project FROM incoming ORDER BY project
    ON CONFLICT DO NOTHING
"""
# PostgreSQL sends each row to its partition. A row that an earlier run has loaded meets the unique
# constraint and is left out.
INSERT_YEAR = """
    INSERT INTO pypi_upload
        (project_id, version, filename, packagetype, python_version, size, uploaded_at, yanked)
    SELECT pypi_project.id, version, filename, packagetype, python_version, size, uploaded_at, yanked
    FROM incoming JOIN pypi_project ON pypi_project.name = incoming.project
    WHERE extract(year FROM uploaded_at AT TIME ZONE 'UTC') = %s
    ORDER BY uploaded_at, filename
    ON CONFLICT DO NOTHING
"""


class Command(BaseCommand):
    help = "Loads uploaded files from a CSV file; rows that are there already stay as they are."

    def add_arguments(self, parser):
        parser.add_argument("path", nargs="?", type=Path, default=DEFAULT_PATH)

    def handle(self, *, path, **options):
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute(STAGE)
            with (
                gzip.open(path) as file,
                cursor.copy("COPY incoming FROM STDIN (FORMAT csv, HEADER)") as copy,
            ):
                while chunk := file.read(CHUNK):
                    copy.write(chunk)
            cursor.execute(INSERT_PROJECTS)
            cursor.execute(
                "SELECT extract(year FROM uploaded_at AT TIME ZONE 'UTC'), count(*) FROM incoming"
                " GROUP BY 1 ORDER BY 1"
            )
            years = cursor.fetchall()
            with Progress(sum(rows for _, rows in years), "rows loaded") as progress:
                for year, rows in years:
                    cursor.execute(INSERT_YEAR, [year])
                    progress.advance(rows)
        with connection.cursor() as cursor:
            # Autovacuum analyzes partitions, never the partitioned table itself.
            cursor.execute("ANALYZE pypi_upload")
        self.stdout.write(f"{Upload.objects.count():,} rows in {Upload._meta.db_table}")
