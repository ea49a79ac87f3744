"""One module, one experiment: its `Config` and `experiment(config)`; `python -m experiments` lists them."""
