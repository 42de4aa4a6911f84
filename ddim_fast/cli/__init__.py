"""What commands share. It is imported before anything that a command needs and that may not be installed."""

from .missing import name_missing_packages

name_missing_packages()
