"""`python -m cogview`, as torchrun starts it."""

from cogview.cli import main

if __name__ == "__main__":
    main()
