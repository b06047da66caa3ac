"""How good drawn pictures are: features of pictures and the distances between their distributions."""
