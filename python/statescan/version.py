"""The version, as installed."""

from importlib import metadata

try:
    __version__ = metadata.version("statescan")
except metadata.PackageNotFoundError:  # run from a source tree, see `make dev`
    __version__ = "0+source"
