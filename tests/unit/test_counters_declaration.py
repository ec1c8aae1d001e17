"""What can be declared, what it is called, and what is refused with which words."""

import pytest
from django.core.exceptions import FieldDoesNotExist
from django.db import models
from django.db.models import Avg, Count, Max, Q, Sum
from django.db.models.functions import Lower, TruncDay
from django.test.utils import isolate_apps

from django_scaledb.counters.checks import _check_declaration
from django_scaledb.counters.options import CounterOptions
from django_scaledb.models import CounterModel
from tests.counterapp.models import (
    DownloadsEver,
    ShownPerKind,
    Upload,
    UploadsInAll,
    UploadsPerMonth,
    UploadsPerOwner,
    UploadsPerProject,
)


def declare(**attrs):
    with isolate_apps("tests.counterapp"):
        meta = type("CounterMeta", (), {"source": Upload, "totals": {"total": Count("*")}} | attrs)
        return type(
            "Counter", (CounterModel,), {"CounterMeta": meta, "__module__": "tests.counterapp.models"}
        )


def names(model):
    return {field.attname for field in model._meta.fields}


def test_columns_are_called_what_group_by_and_totals_say():
    assert names(UploadsPerProject) == {"id", "project_id", "total", "bytes"}
    assert names(UploadsPerOwner) == {"id", "owner_id", "country", "total", "bytes"}
    assert names(UploadsPerMonth) == {"id", "month", "total"}
    assert names(ShownPerKind) == {"id", "kind", "project_id", "total", "large", "bytes"}
    assert names(UploadsInAll) == {"id", "total", "sized", "mean", "mean_sum", "mean_count"}
    assert names(DownloadsEver) == {"id", "total", "bytes", "total_kept", "bytes_kept"}


def test_foreign_keys_of_counters_stop_nobody():
    field = UploadsPerProject._meta.get_field("project")
    assert field.remote_field.on_delete is models.DO_NOTHING
    assert not field.db_constraint
    assert field.null


def test_keys_are_unique_with_null_as_a_value():
    (unique,) = UploadsPerProject._meta.constraints
    assert unique.fields == ("project",)
    assert unique.nulls_distinct is False


def test_a_span_is_named_by_its_last_step():
    counter = declare(group_by=["project__owner", TruncDay("at")])
    assert names(counter) == {"id", "owner_id", "day", "total"}


@pytest.mark.parametrize(
    ("attrs", "words"),
    [
        ({"totals": {"last": Max("at")}}, "is a Max: when the smallest or largest row goes"),
        ({"totals": {"kinds": Count("kind", distinct=True)}}, "is distinct"),
        ({"totals": {"x": Sum("at")}}, "sums a DateTimeField; use an integer or a DecimalField"),
        ({"totals": {"x": 5}}, "must be a Count, a Sum or an Avg"),
        ({"totals": {}}, "totals is empty"),
        ({"group_by": ["nope"]}, "counterapp.Upload has no field 'nope'"),
        ({"group_by": ["tags"]}, "a row must belong to one group"),
        ({"group_by": ["kind__owner"]}, "is no foreign key"),
        ({"group_by": "project"}, r"must be a list, such as \['project'\]"),
        ({"group_by": ["project__name", "project__owner__name"]}, "two columns would be called 'name'"),
        ({"group_by": [Lower("kind")]}, "has no name of its own"),
        ({"source": 5}, "CounterMeta.source must be a model"),
        ({"totals": {"x": Sum("project__owner")}}, "may use columns of counterapp.Upload alone"),
    ],
)
def test_what_cannot_be_counted_is_refused_by_a_check(attrs, words):
    counter = declare(**attrs)
    (error,) = _check_declaration(counter)
    assert error.id == "django_scaledb.E042"
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(error.msg)


def test_unknown_options_and_words_are_refused():
    found = list(_check_declaration(declare(mechanism="magic", on_detach="explode", groupby=[])))
    assert [error.id for error in found] == [
        "django_scaledb.E040",
        "django_scaledb.E041",
        "django_scaledb.E041",
    ]


def test_a_source_that_is_not_there():
    (error,) = _check_declaration(declare(source="pypi.Nothing"))
    assert error.id == "django_scaledb.E043"
    assert "pypi.nothing" in error.msg


def test_for_key_wants_every_group_and_no_other():
    with pytest.raises(TypeError, match=r"needs kind=\.\."):
        ShownPerKind.objects.for_key(project=1)
    with pytest.raises(TypeError, match="got size"):
        UploadsPerProject.objects.for_key(project=1, size=3)


def test_declarations_are_values():
    options = CounterOptions("a.B", "a", {"source": "Upload", "where": Q(x=1), "totals": {"n": Avg("x")}})
    assert options.source_key == ("a", "upload")
    with pytest.raises(FieldDoesNotExist):
        UploadsPerProject._meta.get_field("nothing")
