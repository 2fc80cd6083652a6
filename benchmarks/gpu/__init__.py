"""Measurements and checks for a machine with one large GPU; `--small` and `--device cpu` try the scripts on any."""
