"""Layouts, one a file: each registers itself when this folder is imported."""

from importlib import import_module
from pkgutil import iter_modules

for _file in iter_modules(__path__):
    import_module(f".{_file.name}", __package__)
