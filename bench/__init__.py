"""Measures stortrends-ha beside other NBD servers on the same machine; `make bench` runs it."""
