"""One file per errand: run as `python scripts/NAME.py key=value`."""
