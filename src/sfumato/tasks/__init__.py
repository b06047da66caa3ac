"""What a model can be asked to do, one module each: compositions of the parts, without mathematics of their own."""
