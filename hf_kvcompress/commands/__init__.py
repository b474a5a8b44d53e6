"""The subcommands of `kvcompress`: one module each, imported by `cli` when the `cli` extra is there."""
