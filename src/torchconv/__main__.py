"""``python -m torchconv``: the command line."""

from torchconv.cli import main

if __name__ == "__main__":
    main()
