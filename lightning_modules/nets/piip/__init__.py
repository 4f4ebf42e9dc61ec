"""Parameter-inverted image pyramids, PIIP, arXiv 2406.04330 and 2501.07783."""
