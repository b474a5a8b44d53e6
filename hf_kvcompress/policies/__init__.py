"""Policies: which tokens stay."""
