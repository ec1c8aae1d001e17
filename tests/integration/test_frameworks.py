"""What an application does with a model besides querying it: admin, DRF, fixtures, forms."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from django.contrib import admin
from django.core.management import call_command
from django.db import connection, models
from django.forms import modelform_factory
from django.test.utils import isolate_apps
from django.urls import reverse
from psqlextra.models import PostgresPartitionedModel
from rest_framework import serializers, viewsets
from rest_framework.test import APIRequestFactory

from tests.testapp.models import Account, Event, Tag

pytestmark = pytest.mark.django_db

MOMENT = datetime(2024, 3, 5, 13, 7, 11, 123456, tzinfo=UTC)


@admin.register(Event)
class EventAdmin(admin.ModelAdmin):
    list_display = ["id", "happened_at", "size"]
    list_filter = ["account"]
    date_hierarchy = "happened_at"
    search_fields = ["=size"]


def test_the_admin_lists_adds_changes_and_deletes(admin_client):
    account = Account.objects.create(name="a")
    add = reverse("admin:testapp_event_add")
    values = {"account": account.pk, "size": 5, "happened_at_0": "2024-03-05", "happened_at_1": "13:07:11"}
    tag = Tag.objects.create(name="t")
    response = admin_client.post(add, {**values, "tags": [tag.pk]})
    assert response.status_code == 302, response.content
    event = Event.objects.get()
    listing = admin_client.get(reverse("admin:testapp_event_changelist"), {"happened_at__year": 2024})
    assert f"/event/{event.pk}/change/".encode() in listing.content
    change = reverse("admin:testapp_event_change", args=[event.pk])
    response = admin_client.post(change, {**values, "happened_at_0": "2031-01-01", "tags": [tag.pk]})
    assert response.status_code == 302
    event.refresh_from_db()
    assert event.happened_at.year == 2031
    assert admin_client.get(reverse("admin:testapp_event_history", args=[event.pk])).status_code == 200
    response = admin_client.post(
        reverse("admin:testapp_event_changelist"),
        {"action": "delete_selected", "_selected_action": [event.pk], "post": "yes"},
    )
    assert response.status_code == 302
    assert not Event.objects.exists()


class EventSerializer(serializers.ModelSerializer):
    class Meta:
        model = Event
        fields = ["id", "account", "size", "happened_at"]


class EventViewSet(viewsets.ModelViewSet):
    queryset = Event.objects.order_by("pk")
    serializer_class = EventSerializer
    authentication_classes = []
    permission_classes = []


def test_drf_serializers_and_viewsets():
    factory = APIRequestFactory()
    many = EventViewSet.as_view({"get": "list", "post": "create"})
    one = EventViewSet.as_view({"get": "retrieve", "patch": "partial_update", "delete": "destroy"})
    made = many(factory.post("/", {"size": 3, "happened_at": MOMENT.isoformat()}, format="json"))
    assert made.status_code == 201, made.data
    pk = made.data["id"]
    changed = one(factory.patch("/", {"happened_at": "2031-05-01T00:00:00Z"}, format="json"), pk=pk)
    assert changed.status_code == 200, changed.data
    assert [row["id"] for row in many(factory.get("/")).data] == [pk]
    assert one(factory.delete("/"), pk=pk).status_code == 204
    assert not Event.objects.exists()


def test_fixtures_go_out_and_in(tmp_path):
    account = Account.objects.create(name="a")
    Event.objects.create(account=account, happened_at=MOMENT, size=1)
    for suffix in ("json", "jsonl", "xml"):
        path = tmp_path / f"events.{suffix}"
        call_command("dumpdata", "testapp.account", "testapp.event", format=suffix, output=str(path))
        call_command("loaddata", str(path), verbosity=0)
        assert Event.objects.count() == 1
        Event.objects.all().delete()
        call_command("loaddata", str(path), verbosity=0)
        assert Event.objects.get().account == account


def test_a_model_form_edits():
    event = Event.objects.create(happened_at=MOMENT, size=1)
    form_class = modelform_factory(Event, fields=["size", "happened_at"])
    form = form_class({"size": 2, "happened_at": "2031-01-01 00:00:00"}, instance=event)
    assert form.is_valid(), form.errors
    form.save()
    assert Event.objects.get().happened_at.year == 2031


def test_related_managers_reach_into_the_partitions():
    account = Account.objects.create(name="a")
    account.event_set.create(happened_at=MOMENT, size=4)
    assert account.event_set.get().size == 4
    event = Event.objects.select_related("account").get()
    event.tags.set([Tag.objects.create(name=n) for n in "xyz"])
    assert list(Event.objects.filter(tags__name="x")) == [event]
    assert Event.objects.prefetch_related("tags").get().tags.count() == 3
    event.comment_set.create(text="hello")
    assert event.comment_set.get().event == event


@isolate_apps("tests.testapp")
def test_partitioned_models_of_django_postgres_extra_stay_its_own():
    class Theirs(PostgresPartitionedModel):
        at = models.DateTimeField()

        class Meta:
            app_label = "testapp"

        class PartitioningMeta:
            key = ["at"]

    with connection.schema_editor() as editor:
        editor.create_partitioned_model(Theirs)
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_get_partkeydef('testapp_theirs'::regclass)")
        assert cursor.fetchone() == ("RANGE (at)",)
        cursor.execute("SELECT count(*) FROM pg_inherits WHERE inhparent = 'testapp_theirs'::regclass")
        assert cursor.fetchone() == (0,)
