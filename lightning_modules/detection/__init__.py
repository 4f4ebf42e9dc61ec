"""Maths of dense detectors: boxes, anchors, codings, assignment, losses, and boxes out of maps. No Lightning.

Boxes are `(n, 4)` x1, y1, x2, y2 in pixels. `extent` is what a box reaches beyond `x2 - x1`: 0 today, 1 in the legacy
pixel convention, which older weights were trained with.
"""
