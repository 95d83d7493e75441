"""``python -m neocog``: the same as the ``neocog`` command."""

from neocog.cli import main

if __name__ == "__main__":
    main()
