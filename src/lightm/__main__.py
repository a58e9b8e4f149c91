"""`python -m lightm`."""

from lightm.cli import main

if __name__ == "__main__":
    main()
