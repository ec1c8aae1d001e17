"""The overview page's place in the admin: an entry in the index, a permission, and one read-only page.

The default admin site finds it by itself. A site of your own that does not find its models by `autodiscover`
takes one line::

    site.register(Overview, OverviewAdmin)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse, HttpResponseNotAllowed
from django.template.response import TemplateResponse
from django.urls import URLPattern, path
from django.utils import timezone

from django_scaledb.models import Overview
from django_scaledb.overview.page import build

if TYPE_CHECKING:
    _ModelAdmin = admin.ModelAdmin[Overview]
else:
    _ModelAdmin = admin.ModelAdmin


@admin.register(Overview)
class OverviewAdmin(_ModelAdmin):
    """Shows the page in place of a list of objects.

    Whoever may see it is a superuser, or has the permission ``django_scaledb.view_overview``.
    """

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view(self.overview)
        # The second name is the one that the index links to.
        return [
            path("", view, name="django_scaledb_overview"),
            path("", view, name=f"{self.opts.app_label}_{self.opts.model_name}_changelist"),
        ]

    def overview(self, request: HttpRequest) -> HttpResponse:
        """The page; only looks, so that GET is all that there is."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        if request.method not in ("GET", "HEAD"):
            return HttpResponseNotAllowed(["GET", "HEAD"])
        request.current_app = self.admin_site.name
        context = {
            **self.admin_site.each_context(request),
            "title": "Overview",
            "opts": self.opts,
            "page": build(timezone.now(), request.GET.get("page")),
        }
        return TemplateResponse(request, "django_scaledb/overview.html", context)
