"""`python -m sparkmim`."""

from sparkmim.cli import main

if __name__ == "__main__":
    main()
