"""What the ops launch: the compiled core (`cpp`) and the Triton kernels (`triton`)."""
