"""A seeded simulation of the mirror: the production code of ``replication`` and the NBD decoder in a world of fakes."""
