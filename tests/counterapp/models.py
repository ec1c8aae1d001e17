"""Sources and counters of every kind that the package promises, in both mechanisms."""

from django.db import models
from django.db.models import Avg, Count, Q, Sum
from django.db.models.functions import TruncMonth
from psqlextra.models import PostgresModel

from django_scaledb.models import CounterModel, PartitionedModel


class Owner(models.Model):
    name = models.CharField(max_length=50)
    country = models.CharField(max_length=20, default="")


class Project(models.Model):
    name = models.CharField(max_length=50)
    owner = models.ForeignKey(Owner, on_delete=models.CASCADE, null=True)


class Tag(models.Model):
    name = models.CharField(max_length=50)


class Upload(models.Model):
    project = models.ForeignKey(Project, on_delete=models.CASCADE, null=True)
    size = models.BigIntegerField(null=True, default=0)
    kind = models.CharField(max_length=20, default="a%'b\\")
    yanked = models.BooleanField(default=False, null=True)
    at = models.DateTimeField(null=True)
    filename = models.CharField(max_length=50, null=True, unique=True)
    tags = models.ManyToManyField(Tag)


class Download(PartitionedModel):
    project = models.ForeignKey(Project, on_delete=models.CASCADE, null=True)
    size = models.BigIntegerField(null=True, default=0)
    at = models.DateTimeField()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["project", "size", "at"], name="download_once")]

    class PartitioningMeta:
        key = ["at"]
        interval = "1 year"
        retention = "3 years"


class Delivery(models.Model):
    """What the counters by trigger count: the columns of Upload."""

    project = models.ForeignKey(Project, on_delete=models.CASCADE, null=True)
    size = models.BigIntegerField(null=True, default=0)
    kind = models.CharField(max_length=20, default="a%'b\\")
    yanked = models.BooleanField(default=False, null=True)
    at = models.DateTimeField(null=True)
    filename = models.CharField(max_length=50, null=True, unique=True)


class Parcel(PostgresModel):
    """A model whose managers and queries are django-postgres-extra's."""

    project = models.ForeignKey(Project, on_delete=models.CASCADE, null=True)
    size = models.BigIntegerField(null=True, default=0)
    filename = models.CharField(max_length=50, null=True, unique=True)


class UploadsPerProject(CounterModel):
    class CounterMeta:
        source = "counterapp.Upload"
        group_by = ["project"]
        totals = {"total": Count("*"), "bytes": Sum("size")}


class UploadsInAll(CounterModel):
    class CounterMeta:
        source = Upload
        totals = {"total": Count("*"), "sized": Count("size"), "mean": Avg("size")}


class ShownPerKind(CounterModel):
    """A filter, several groups, and a string that tests quoting."""

    class CounterMeta:
        source = "Upload"
        group_by = ["kind", "project"]
        where = Q(yanked=False) & ~Q(kind="100% \\ 'hidden'")
        totals = {"total": Count("*"), "large": Count("pk", filter=Q(size__gt=100)), "bytes": Sum("size")}


class UploadsPerMonth(CounterModel):
    class CounterMeta:
        source = "counterapp.Upload"
        group_by = [TruncMonth("at")]
        totals = {"total": Count("*")}


class UploadsPerOwner(CounterModel):
    class CounterMeta:
        source = "counterapp.Upload"
        group_by = {"owner": "project__owner", "country": "project__owner__country"}
        totals = {"total": Count("*"), "bytes": Sum("size")}


class ParcelsPerProject(CounterModel):
    class CounterMeta:
        source = "counterapp.Parcel"
        group_by = ["project"]
        totals = {"total": Count("*"), "bytes": Sum("size")}


class TagsPerUpload(CounterModel):
    class CounterMeta:
        source = Upload.tags.through
        group_by = ["tag"]
        totals = {"total": Count("*")}


class DownloadsPerProject(CounterModel):
    class CounterMeta:
        source = "counterapp.Download"
        group_by = ["project"]
        totals = {"total": Count("*"), "bytes": Sum("size")}


class DownloadsEver(CounterModel):
    class CounterMeta:
        source = "counterapp.Download"
        totals = {"total": Count("*"), "bytes": Sum("size")}
        on_detach = "keep"


class Shipment(PartitionedModel):
    """What a counter by trigger counts on a partitioned table."""

    project = models.ForeignKey(Project, on_delete=models.CASCADE, null=True)
    size = models.BigIntegerField(null=True, default=0)
    at = models.DateTimeField()

    class PartitioningMeta:
        key = ["at"]
        interval = "1 year"
        retention = "3 years"


class DeliveriesPerProject(CounterModel):
    class CounterMeta:
        source = "counterapp.Delivery"
        group_by = ["project"]
        totals = {"total": Count("*"), "bytes": Sum("size")}
        mechanism = "trigger"


class DeliveriesInAll(CounterModel):
    class CounterMeta:
        source = "counterapp.Delivery"
        totals = {"total": Count("*"), "sized": Count("size"), "mean": Avg("size")}
        mechanism = "trigger"


class DeliveriesPerKind(CounterModel):
    class CounterMeta:
        source = "counterapp.Delivery"
        group_by = ["kind", TruncMonth("at")]
        where = Q(yanked=False) & ~Q(kind="100% \\ 'hidden'")
        totals = {"total": Count("*"), "large": Count("pk", filter=Q(size__gt=100)), "bytes": Sum("size")}
        mechanism = "trigger"


class DeliveriesPerOwner(CounterModel):
    class CounterMeta:
        source = "counterapp.Delivery"
        group_by = {"owner": "project__owner", "country": "project__owner__country"}
        totals = {"total": Count("*"), "bytes": Sum("size")}
        mechanism = "trigger"


class ShipmentsPerProject(CounterModel):
    class CounterMeta:
        source = "counterapp.Shipment"
        group_by = ["project"]
        totals = {"total": Count("*"), "bytes": Sum("size")}
        mechanism = "trigger"
