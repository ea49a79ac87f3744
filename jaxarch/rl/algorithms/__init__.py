"""One algorithm a file, each an `Agent`: how it acts and how it learns."""
