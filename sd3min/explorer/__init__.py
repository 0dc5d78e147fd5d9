"""The local page of `sd3min explore`: draw, and see where each word of the prompt was read."""
