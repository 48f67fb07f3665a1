"""`python -m minisd` is the command line."""

from minisd.cli import main

main()
