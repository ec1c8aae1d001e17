#!/usr/bin/env python3
"""Django's command line for the example project."""

import os
import sys

from django.core.management import execute_from_command_line

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "pypi_mirror.settings")
execute_from_command_line(sys.argv)
