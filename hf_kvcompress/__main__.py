"""`python -m hf_kvcompress` is the `kvcompress` command."""

from .cli import main

if __name__ == "__main__":
    main()
