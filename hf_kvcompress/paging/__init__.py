"""Memory in blocks: pools, block tables, a cache that shares its pages, and an engine over it."""
