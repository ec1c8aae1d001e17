"""What the overview page stands on in the admin: an entry in the index, and a permission of its own."""

from __future__ import annotations

from django_scaledb.runs import LastRun


class Overview(LastRun):
    """Has no table and no rows: a name for the page, and the permission ``django_scaledb.view_overview``.

    A proxy and not an unmanaged model, because ``dumpdata`` reads the tables of unmanaged ones.
    """

    class Meta:
        app_label = "django_scaledb"
        proxy = True
        default_permissions = ("view",)
        verbose_name = "overview"
        verbose_name_plural = "overview"
