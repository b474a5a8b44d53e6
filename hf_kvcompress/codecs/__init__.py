"""Codecs by name: one file each, one registry line each."""
