"""stortrends-ha: an active/active, synchronously mirrored block-storage daemon for two Linux boxes."""

__version__ = "0.1.0"
