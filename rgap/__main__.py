"""``python -m rgap``, the same as the command ``rgap``."""

from rgap.cli import main

if __name__ == "__main__":
    main()
