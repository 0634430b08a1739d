"""Backing files and devices, and the durable state of a group's replica."""
