"""Model files: the one reader and writer (`io`) and the layouts of other programs (`formats`)."""
