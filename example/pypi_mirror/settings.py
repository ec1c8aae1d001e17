"""Settings of the example: an index of uploaded files on a primary and, if there is one, a replica.

PYPI_MIRROR_PRIMARY and PYPI_MIRROR_REPLICA are connection strings as psql takes them. demo.py
sets both to the servers that it starts.
"""

import os
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict

BASE_DIR = Path(__file__).resolve().parent.parent


def database(dsn: str, **more: object) -> dict[str, object]:
    parts = conninfo_to_dict(dsn)
    return {
        "ENGINE": "django_scaledb.backend",
        "NAME": parts.get("dbname", ""),
        "USER": parts.get("user", ""),
        "PASSWORD": parts.get("password", ""),
        "HOST": parts.get("host", ""),
        "PORT": parts.get("port", ""),
        **more,
    }


DATABASES = {"default": database(os.environ.get("PYPI_MIRROR_PRIMARY", "dbname=pypi_mirror"))}
if "PYPI_MIRROR_REPLICA" in os.environ:
    DATABASES["replica1"] = database(os.environ["PYPI_MIRROR_REPLICA"], TEST={"MIRROR": "default"})

DATABASE_ROUTERS = ["django_scaledb.routing.ReplicaRouter"]
SCALEDB = {"REPLICAS": [alias for alias in DATABASES if alias != "default"]}

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "django.contrib.staticfiles",
    "django_scaledb",
    "pypi",
    "pypi_counters",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django_scaledb.routing.ReadYourWritesMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
ROOT_URLCONF = "pypi_mirror.urls"
SECRET_KEY = "the example runs on this machine only"
DEBUG = True
ALLOWED_HOSTS = ["localhost", "127.0.0.1"]
STATIC_URL = "static/"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
TIME_ZONE = "UTC"
USE_TZ = True
