"""What makes it quick and small: one trick per file, each equal to the plain path to rounding.

The plain modules stay as they are, and nothing here is needed to understand them.
"""
