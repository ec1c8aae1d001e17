from django.apps import AppConfig


class PypiConfig(AppConfig):
    name = "pypi"
    verbose_name = "Package index"
