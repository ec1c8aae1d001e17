"""Django REST framework over HTTP: serializers, its own paginations with our counts, and ours."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext, modify_settings
from django.urls import path
from rest_framework import filters, generics, pagination, serializers
from rest_framework.test import APIClient, RequestsClient

from django_scaledb.contrib.drf import (
    CountedLimitOffsetPagination,
    CountedPageNumberPagination,
    KeysetPagination,
)
from django_scaledb.testing import assert_pruned, assert_same_totals
from tests.counterapp.models import Download, DownloadsPerProject, Project
from tests.testapp.models import Trace

pytestmark = [pytest.mark.django_db, pytest.mark.urls(__name__)]

START = datetime(2024, 3, 5, 13, 7, 11, 123456, tzinfo=UTC)


class DownloadSerializer(serializers.ModelSerializer):
    class Meta:
        model = Download
        fields = ["id", "project", "size", "at"]


class TraceSerializer(serializers.ModelSerializer):
    class Meta:
        model = Trace
        fields = ["id", "name"]


class Keyset(KeysetPagination):
    page_size = 3
    page_size_query_param = "size"
    max_page_size = 5


class Numbered(CountedPageNumberPagination):
    page_size = 3


class Offset(CountedLimitOffsetPagination):
    default_limit = 3


class DRFOffset(pagination.LimitOffsetPagination):
    default_limit = 3


class DownloadList(generics.ListCreateAPIView):
    serializer_class = DownloadSerializer
    authentication_classes = []
    permission_classes = []
    filter_backends = [filters.SearchFilter]
    search_fields = ["=size"]

    def get_queryset(self):
        found = (
            Download.objects.order_by("at", "pk")
            if "old" in self.request.query_params
            else Download.objects.all()
        )
        if issubclass(self.pagination_class, pagination.CursorPagination):
            return found
        project = self.request.query_params.get("project")
        found = found.order_by("-at", "-pk")
        return found.filter(project=project) if project else found


class TraceList(generics.ListAPIView):
    queryset = Trace.objects.all()
    serializer_class = TraceSerializer
    pagination_class = Keyset
    authentication_classes = []
    permission_classes = []


urlpatterns = [
    path("keyset/", DownloadList.as_view(pagination_class=Keyset)),
    path("numbered/", DownloadList.as_view(pagination_class=Numbered)),
    path("offset/", DownloadList.as_view(pagination_class=Offset)),
    path("drf-offset/", DownloadList.as_view(pagination_class=DRFOffset)),
    path("traces/", TraceList.as_view()),
]


@pytest.fixture
def downloads():
    project = Project.objects.create(name="p")
    made = [
        Download.objects.create(project=project, size=n, at=START - timedelta(microseconds=n // 2))
        for n in range(8)
    ]
    return sorted(made, key=lambda d: (d.at, d.pk), reverse=True)


def follow(client, url: str, link: str = "next") -> tuple[list[int], str]:
    """The ids of this page and of all that its links lead to, and the last page's address."""
    answer = client.get(url).json()
    ids = [row["id"] for row in answer["results"]]
    while answer[link]:
        url = answer[link]
        answer = client.get(url).json()
        ids = (
            ids + [r["id"] for r in answer["results"]]
            if link == "next"
            else [r["id"] for r in answer["results"]] + ids
        )
    return ids, url


def test_pages_by_position_over_http(downloads):
    client = RequestsClient()
    base = "http://testserver/keyset/"
    ids, last = follow(client, base)
    assert ids == [d.pk for d in downloads]
    assert follow(client, last, "previous")[0] == ids
    assert follow(client, base + "?old=1")[0] == ids[::-1]
    assert follow(client, base + "?size=2")[0] == ids
    assert len(client.get(base + "?size=50").json()["results"]) == 5
    assert follow(client, base + "?search=3")[0] == [d.pk for d in downloads if d.size == 3]
    assert client.get(base + "?cursor=nonsense").status_code == 404
    assert client.get(base).json()["results"][0]["at"] == "2024-03-05T13:07:11.123456Z"


def test_no_page_by_position_is_counted(downloads):
    client = APIClient()
    with CaptureQueriesContext(connection) as captured:
        url = client.get("/keyset/").json()["next"]
    assert not [q for q in captured if re.search("COUNT|OFFSET", q["sql"])]
    with assert_pruned():
        client.get(url)


def test_uuid_keys():
    made = [Trace.objects.create(name=str(n)) for n in range(7)]
    assert follow(APIClient(), "/traces/")[0] == [str(trace.pk) for trace in reversed(made)]


@pytest.mark.parametrize("url", ["/numbered/", "/offset/"])
def test_counts_come_from_a_counter(url, downloads):
    client = APIClient()
    project = downloads[0].project
    assert_same_totals(DownloadsPerProject)
    with CaptureQueriesContext(connection) as captured:
        answer = client.get(url, {"project": project.pk}).json()
    assert answer["count"] == 8
    assert not [q for q in captured if "COUNT" in q["sql"]]
    assert follow(client, f"{url}?project={project.pk}")[0] == [d.pk for d in downloads]
    with CaptureQueriesContext(connection) as captured:
        assert client.get(url, {"search": "3"}).json()["count"] == 1
    assert [q for q in captured if "COUNT" in q["sql"]]


def test_paginations_of_drf_itself(downloads):
    assert follow(APIClient(), "/drf-offset/")[0] == [d.pk for d in downloads]


def test_a_key_that_went_out_comes_back(downloads):
    client = APIClient()
    row = client.get("/keyset/").json()["results"][0]
    assert Download.objects.get(pk=row["id"], at=row["at"]).size == row["size"]
    del row["id"]
    made = client.post("/keyset/", {**row, "size": 99}, format="json")
    assert made.status_code == 201, made.json()
    assert Download.objects.get(pk=made.json()["id"]).at == START


@modify_settings(INSTALLED_APPS={"append": "rest_framework"})
def test_the_browsable_api_has_links(downloads):
    page = APIClient().get("/keyset/", HTTP_ACCEPT="text/html").content.decode()
    assert "cursor=" in page
    view = Keyset()
    assert view.get_paginated_response_schema({})["properties"]["next"]
    assert {p["name"] for p in view.get_schema_operation_parameters(None)} == {"cursor", "size"}
