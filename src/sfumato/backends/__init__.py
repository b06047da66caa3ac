"""How things are computed on the machine at hand; what is computed is `networks`' affair."""
