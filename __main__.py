"""`python -m attnconvert` is the command `attnconvert`."""

from .cli import main

main()
