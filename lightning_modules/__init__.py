"""Methods of Penstock: one LightningModule a file, with the maths, networks and callbacks they share."""
