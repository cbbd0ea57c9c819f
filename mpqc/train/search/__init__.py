"""Searches that train: relaxed widths, learned with the weights. See docs/train/search.md."""
