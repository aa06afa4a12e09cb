"""One run, seen from the server."""
