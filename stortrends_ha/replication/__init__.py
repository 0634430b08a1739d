"""The mirror itself, pure: it calls the store, link and clients that it is given, and owns no I/O or clock."""
