"""Command line of Penstock."""
def main(): raise SystemExit("todo")
