"""Django REST framework: pages of a partitioned model by position, and counts out of counters.

Needs ``django-scaledb[drf]``::

    class UploadViewSet(viewsets.ReadOnlyModelViewSet):
        queryset = Upload.objects.all()
        pagination_class = KeysetPagination
"""

from __future__ import annotations

from typing import Any

from django.core.paginator import InvalidPage
from rest_framework.exceptions import NotFound
from rest_framework.pagination import CursorPagination, LimitOffsetPagination, PageNumberPagination
from rest_framework.utils.urls import replace_query_param

from django_scaledb.counters.paginator import CounterPaginator, cover, found_in
from django_scaledb.partitions.paginator import KeysetPage, KeysetPaginator


class KeysetPagination(CursorPagination):  # type: ignore[misc]  # DRF has no types
    """Pages by (key, id), as `KeysetPaginator` has them, in the responses of DRF's `CursorPagination`.

    `page_size`, `page_size_query_param`, `max_page_size` and `cursor_query_param` are as there. The
    order is the queryset's, newest first unless it says ``order_by(key)``. A cursor that was not
    made here is answered with 404.
    """

    ordering = None
    page: KeysetPage

    def paginate_queryset(self, queryset: Any, request: Any, view: Any = None) -> list[Any] | None:
        self.request = request
        self.page_size = self.get_page_size(request)
        if not self.page_size:
            return None
        self.base_url = request.build_absolute_uri()
        try:
            paginator = KeysetPaginator(queryset, self.page_size)
            self.page = paginator.page(request.query_params.get(self.cursor_query_param))
        except InvalidPage as error:
            raise NotFound(self.invalid_cursor_message) from error
        self.has_next, self.has_previous = self.page.has_next(), self.page.has_previous()
        if (self.has_next or self.has_previous) and self.template is not None:
            self.display_page_controls = True
        return list(self.page.object_list)

    def get_next_link(self) -> str | None:
        return self._link(self.page.next_token)

    def get_previous_link(self) -> str | None:
        return self._link(self.page.previous_token)

    def _link(self, token: str | None) -> str | None:
        return token and replace_query_param(self.base_url, self.cursor_query_param, token)


class CountedPageNumberPagination(PageNumberPagination):  # type: ignore[misc]  # DRF has no types
    """DRF's pages by number, counted by a counter where one covers the filter."""

    django_paginator_class = CounterPaginator


class CountedLimitOffsetPagination(LimitOffsetPagination):  # type: ignore[misc]  # DRF has no types
    """DRF's limit and offset, counted by a counter where one covers the filter."""

    def get_count(self, queryset: Any) -> int:
        found = cover(queryset)
        count: int = super().get_count(queryset) if found is None else found.count(found_in(queryset))
        return count
