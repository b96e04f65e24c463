"""`python -m jaxgpt`, for where the `jaxgpt` command is not on the path."""

from jaxgpt.cli import main

if __name__ == "__main__":
    main()
