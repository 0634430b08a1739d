"""Arbiters: where the records live, and who grants a change of one."""
