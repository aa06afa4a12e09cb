"""One client's part of a round."""
