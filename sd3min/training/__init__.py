"""Training: scenes drawn at run time, and a detector that scores pictures of them."""
