"""Uploads and bytes per project, kept exact by what writes them."""

from django.db.models import Count, Sum

from django_scaledb.models import CounterModel


class ProjectUploads(CounterModel):
    class CounterMeta:
        source = "pypi.Upload"
        group_by = ["project"]
        totals = {"total": Count("*"), "bytes": Sum("size")}
        mechanism = "trigger"  # the history is loaded by COPY

    class Meta:
        verbose_name_plural = "project uploads"
