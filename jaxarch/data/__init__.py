"""What the families learn from: an embedded default and readers of the user's own files."""
