"""One module is one measured question; each takes `--output DIR` and writes a JSON file of records there."""
