from tests.helpers.federations import drawings, quick, settings

__all__ = ["drawings", "quick", "settings"]
