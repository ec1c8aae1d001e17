"""System checks of all features; importing this module registers them."""

from django.core import checks

from django_scaledb.partitions import checks as partition_checks

checks.register(partition_checks.check_models, checks.Tags.models)
checks.register(partition_checks.check_relations, checks.Tags.models)
checks.register(partition_checks.check_backend, checks.Tags.models)
checks.register(partition_checks.check_database, checks.Tags.database)
