"""The same two tables for each arm of the benchmark."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from django.db import models
from django.db.models import Count, F, Sum
from django.db.models.signals import post_delete, post_save

from django_scaledb.models import CounterModel


@dataclass(frozen=True)
class Arm:
    name: str
    project: Any
    upload: Any

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("scaledb")


class AbstractProject(models.Model):
    name = models.CharField(max_length=50)
    total = models.BigIntegerField(default=0, db_default=0)

    class Meta:
        abstract = True


class AbstractUpload(models.Model):
    size = models.BigIntegerField()
    name = models.CharField(max_length=50)

    class Meta:
        abstract = True


ARMS: dict[str, Arm] = {}


def arm(name: str, prefix: str, project_base: Any = None, upload_meta: dict[str, Any] | None = None) -> Arm:
    attrs = {"__module__": __name__}
    project = project_base or type(f"{prefix}Project", (AbstractProject,), dict(attrs))
    meta = type("Meta", (), upload_meta or {})
    upload = type(
        f"{prefix}Upload",
        (AbstractUpload,),
        {
            **attrs,
            "project": models.ForeignKey(project, on_delete=models.CASCADE, related_name="uploads"),
            "Meta": meta,
        },
    )
    ARMS[name] = Arm(name, project, upload)
    return ARMS[name]


plain = arm("no counter", "Plain")
naive = arm("naive signals", "Naive")


def add(sender: Any, instance: Any, created: bool = False, **kwargs: Any) -> None:
    if created:
        naive.project.objects.filter(pk=instance.project_id).update(total=F("total") + 1)


def subtract(sender: Any, instance: Any, **kwargs: Any) -> None:
    naive.project.objects.filter(pk=instance.project_id).update(total=F("total") - 1)


post_save.connect(add, sender=naive.upload)
post_delete.connect(subtract, sender=naive.upload)

if find_spec("computedfields") is not None:
    from computedfields.models import ComputedFieldsModel, computed

    class ComputedProject(ComputedFieldsModel):
        name = models.CharField(max_length=50)

        @computed(models.BigIntegerField(default=0, db_default=0), depends=[("uploads", ["project"])])
        def total(self) -> int:
            return self.uploads.count() if self.pk else 0

    arm("django-computedfields", "Computed", project_base=ComputedProject)

if find_spec("pgtrigger") is not None:
    import pgtrigger

    change = "UPDATE countersapp_triggeredproject SET total = total {} 1 WHERE id = {}.project_id; "
    arm(
        "row trigger (pgtrigger)",
        "Triggered",
        upload_meta={
            "triggers": [
                pgtrigger.Trigger(
                    name="count_in",
                    when=pgtrigger.After,
                    operation=pgtrigger.Insert | pgtrigger.UpdateOf("project_id"),
                    func=change.format("+", "NEW") + "RETURN NULL;",
                ),
                pgtrigger.Trigger(
                    name="count_out",
                    when=pgtrigger.After,
                    operation=pgtrigger.Delete | pgtrigger.UpdateOf("project_id"),
                    func=change.format("-", "OLD") + "RETURN NULL;",
                ),
            ]
        },
    )

signals = arm("scaledb signals", "Signals")
trigger = arm("scaledb trigger", "ByTrigger")


class SignalsUploads(CounterModel):
    class CounterMeta:
        source = signals.upload
        group_by = ["project"]
        totals = {"total": Count("*"), "bytes": Sum("size")}


class TriggerUploads(CounterModel):
    class CounterMeta:
        source = trigger.upload
        group_by = ["project"]
        totals = {"total": Count("*"), "bytes": Sum("size")}
        mechanism = "trigger"
