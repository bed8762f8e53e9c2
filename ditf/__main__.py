"""`python -m ditf`."""

from ditf.cli import main

main()
