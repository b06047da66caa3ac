"""The networks, plain: tensors in, tensors out, under the parameter names of the ecosystem. They know no diffusion."""
