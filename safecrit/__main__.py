"""`python -m safecrit`: the command line."""

from safecrit.cli import main

if __name__ == "__main__":
    main()
