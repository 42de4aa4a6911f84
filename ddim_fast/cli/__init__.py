"""The shared parts of the commands. This module is imported before any package that may not be installed."""

from .missing import name_missing_packages

name_missing_packages()
