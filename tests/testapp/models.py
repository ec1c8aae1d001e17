"""Partitioned models of every kind that the package promises."""

from django.db import models
from django.db.models.functions import Now

from django_scaledb.models import PartitionedModel, UUID7Field


class Account(models.Model):
    name = models.CharField(max_length=50)

    def __str__(self):
        return self.name


class Tag(models.Model):
    name = models.CharField(max_length=50)

    def __str__(self):
        return self.name


class Event(PartitionedModel):
    """The plain case: a timestamp key, a foreign key out, a many-to-many, an index and checks."""

    account = models.ForeignKey(Account, on_delete=models.CASCADE, null=True)
    size = models.BigIntegerField(default=0)
    happened_at = models.DateTimeField()
    tags = models.ManyToManyField(Tag, db_constraint=False)

    class Meta:
        db_table_comment = "what happened, by month"
        indexes = [models.Index(fields=["size"], name="event_size")]
        constraints = [
            models.CheckConstraint(condition=models.Q(size__gte=0), name="event_size_positive"),
            models.UniqueConstraint(fields=["account", "size", "happened_at"], name="event_once"),
        ]

    class PartitioningMeta:
        key = ["happened_at"]
        interval = "1 month"
        premake = 3

    def __str__(self):
        return f"event {self.pk}"


class Comment(models.Model):
    """Points at a timestamp-keyed model: no constraint in the database."""

    event = models.ForeignKey(Event, on_delete=models.CASCADE, db_constraint=False)
    text = models.TextField()


class Reading(PartitionedModel):
    """A DateField key."""

    day = models.DateField()
    value = models.FloatField()

    class PartitioningMeta:
        key = ["day"]
        interval = "1 week"


class Trace(PartitionedModel):
    """The primary key is the partition key."""

    id = UUID7Field(primary_key=True)
    name = models.CharField(max_length=50)

    class PartitioningMeta:
        key = ["id"]
        interval = "1 day"


class Span(models.Model):
    """A real foreign key to a partitioned table."""

    trace = models.ForeignKey(Trace, on_delete=models.CASCADE)
    name = models.CharField(max_length=50)


class Stamped(models.Model):
    """An abstract base, unaware of partitions, that carries the key."""

    made_at = models.DateTimeField(db_default=Now(), db_column="Made At")

    class Meta:
        abstract = True


class Monthly(PartitionedModel):
    """An abstract base that carries a part of the PartitioningMeta."""

    class Meta:
        abstract = True

    class PartitioningMeta:
        key = ["made_at"]
        interval = "1 month"
        premake = 1


class Odd(Stamped, Monthly):
    """Everything unusual about names: mixed case and blanks."""

    label = models.CharField(max_length=50, db_comment="it's odd")

    class Meta:
        db_table = "Odd Table"
        ordering = ["-made_at"]

    class PartitioningMeta:
        premake = 0


class Long(PartitionedModel):
    """A table name that leaves no room for a suffix."""

    at = models.DateTimeField()

    class Meta:
        db_table = "a_table_whose_name_takes_all_of_the_sixty_three_bytes_there_are"

    class PartitioningMeta:
        key = ["at"]
        time_zone = "Europe/Berlin"
        interval = "1 day"
