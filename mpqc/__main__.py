"""``python -m mpqc``."""

from mpqc.cli import main

main()
