"""Prefixes that were read once: a tree of compressed caches in memory, and tiers below it."""
