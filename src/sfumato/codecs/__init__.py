"""Codecs turn pictures into what a model diffuses and back. Pixel-space models need none."""
