"""Other projects: the demo model, evaluation harnesses. Each file imports its own when it is used."""
