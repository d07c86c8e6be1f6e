"""Where the commands compute."""

from cogview.device import available

__all__ = ["available"]
