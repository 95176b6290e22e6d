"""The version of this software, written down once; packaging and announcements read it from here."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
