from tests.helpers.federations import quick, settings

__all__ = ["quick", "settings"]
