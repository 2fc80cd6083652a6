"""`python -m nemotune`: the command line, as torchrun starts it."""

from nemotune.cli.main import main

if __name__ == "__main__":
    main()
