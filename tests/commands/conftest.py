from tests.helpers.doctor import typed

__all__ = ["typed"]
