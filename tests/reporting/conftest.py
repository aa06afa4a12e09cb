from tests.helpers.federations import settings

__all__ = ["settings"]
