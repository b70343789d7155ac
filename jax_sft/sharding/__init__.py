"""The device mesh, and how arrays are split over it."""
