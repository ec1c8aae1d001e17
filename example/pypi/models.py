"""Projects of a package index, and the files uploaded for them."""

from django.db import models

from django_scaledb.models import PartitionedModel


class Project(models.Model):
    name = models.CharField(max_length=100, unique=True)

    def __str__(self) -> str:
        return self.name


class Upload(PartitionedModel):
    """One file; a partition holds the files of one year."""

    project = models.ForeignKey(Project, on_delete=models.CASCADE, related_name="uploads")
    version = models.CharField(max_length=100)
    filename = models.CharField(max_length=255)
    packagetype = models.CharField(max_length=20)
    python_version = models.CharField(max_length=50)
    size = models.BigIntegerField(help_text="bytes")
    uploaded_at = models.DateTimeField()
    yanked = models.BooleanField(default=False)

    class PartitioningMeta:
        key = ["uploaded_at"]
        interval = "1 year"
        premake = 2
        retention = "7 years"

    class Meta:
        constraints = [
            # PostgreSQL wants the partition key in every unique index.
            models.UniqueConstraint(fields=["filename", "uploaded_at"], name="pypi_upload_once"),
        ]

    def __str__(self) -> str:
        return self.filename
