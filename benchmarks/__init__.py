"""Speed comparisons and paper tables."""
