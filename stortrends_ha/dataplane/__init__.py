"""The data process, one per group: the sockets and files around ``replication`` and ``protocol``."""
