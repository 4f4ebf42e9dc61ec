"""DataModules of Penstock: one for each kind of data."""
