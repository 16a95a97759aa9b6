"""``python -m nmgraph`` is the command ``nmgraph``."""

from nmgraph.cli import main

if __name__ == "__main__":
    main()
