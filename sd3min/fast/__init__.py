"""What makes it quick and small: one trick per file, each equal to the plain path up to rounding."""
