"""What our ENGINE keeps of Django's own backend for PostgreSQL."""

from __future__ import annotations

import pytest
from django.db import connection
from django.db.models import FilteredRelation
from django.test.utils import CaptureQueriesContext

from tests.counterapp.models import Project

pytestmark = pytest.mark.django_db


def test_bulk_create_goes_through_unnest():
    with CaptureQueriesContext(connection) as queries:
        Project.objects.bulk_create([Project(name="one"), Project(name="two")])
    assert any("UNNEST(" in query["sql"] for query in queries)


def test_a_dollar_in_an_alias_is_refused():
    with pytest.raises(ValueError, match=r"[Dd]ollar"):
        str(Project.objects.annotate(**{"a$b": FilteredRelation("owner")}).values("a$b").query)
