"""``python -m merganser``: the command line."""

from merganser.cli import main

main()
