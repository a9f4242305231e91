"""``python -m conservtl.cli``."""

from conservtl.cli import main

if __name__ == "__main__":
    main()
